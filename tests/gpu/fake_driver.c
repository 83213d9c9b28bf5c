/* A CUDA driver without a GPU: libcuda.so.1, as far as aiomm calls it by cuda-bindings.
 *
 * Memory of a device is a memfd. A handle names it by process and descriptor, so that another
 * process opens the same bytes. A stream is a thread with a queue. What CUDA forbids is refused
 * with CUDA's error: opening one's own handle, copies that leave an allocation, streams and events
 * of another device, batches on the default stream or of unpinned memory.
 *
 * The environment: FAKE_CUDA_DEVICES (1), FAKE_CUDA_VERSION (13000), FAKE_CUDA_NO_IPC (unset),
 * FAKE_CUDA_FAIL ("cuInit=100": that fails with 100). Tests call the functions fake_*.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ALREADY_REGISTERED = 712,
    NOT_REGISTERED = 713,
};

enum { MAX_DEVICES = 8, MAX_NBYTES = 1 << 30, HOST = 1, DEVICE = 2 };

typedef uint64_t CUdeviceptr;
typedef struct { char bytes[64]; } Handle;
typedef struct { char bytes[16]; } Uuid;
typedef struct { int order, hints[4]; unsigned flags; } Attributes;

typedef struct {
    char magic[8];
    int64_t pid;
    int32_t fd, device;
    uint64_t nbytes, inode;
} Exported;

typedef struct Allocation {
    struct Allocation *next;
    char *base;
    size_t nbytes;
    int device, fd, is_shareable, is_opened;
} Allocation;

typedef struct Pinned {
    struct Pinned *next;
    char *base;
    size_t nbytes;
} Pinned;

typedef struct Context {
    int device;
} Context;

typedef struct Event {
    Context *context;
    uint64_t recorded, over;
    int owners;
} Event;

typedef struct Operation {
    struct Operation *next;
    enum { COPY, RECORD, WAIT } kind;
    void *target;
    const void *source;
    size_t nbytes;
    Event *event;
    uint64_t number;
} Operation;

typedef struct Stream {
    Context *context;
    Operation *first, **last;
    uint64_t given, done;
    int is_closing;
} Stream;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static Context contexts[MAX_DEVICES];
static Stream *null_streams[MAX_DEVICES];
static __thread Context *current;
static Allocation *allocations;
static Pinned *pinned;
static int is_initialized, is_held, broken;
static char failing[64];
static int failure;
static struct { char name[48]; int count; } calls[64];

static int number_of(const char *variable, int otherwise) {
    const char *text = getenv(variable);
    return text ? atoi(text) : otherwise;
}

static int num_devices(void) { return number_of("FAKE_CUDA_DEVICES", 1); }

static int *count_of(const char *name) {
    int place = 0;
    while (*calls[place].name && strcmp(calls[place].name, name)) place++;
    strcpy(calls[place].name, name);
    return &calls[place].count;
}

/* What a call returns before it does anything; counts it. Called with the lock. */
static int refused(const char *name) {
    ++*count_of(name);
    if (!strcmp(failing, name)) {
        *failing = 0;
        return failure;
    }
    return is_initialized ? broken : NOT_INITIALIZED;
}

#define BEGIN                                                                                      \
    pthread_mutex_lock(&lock);                                                                     \
    int status = refused(__func__);                                                                \
    if (status) return ended(status)
#define BEGIN_IN_CONTEXT                                                                           \
    BEGIN;                                                                                         \
    if (!current) return ended(INVALID_CONTEXT)
#define REFUSE(condition, code)                                                                    \
    if (condition) return ended(code)

static int ended(int code) {
    pthread_mutex_unlock(&lock);
    return code;
}

static Allocation *allocation_at(CUdeviceptr address) {
    for (Allocation *each = allocations; each; each = each->next)
        if (address - (CUdeviceptr)each->base < each->nbytes) return each;
    return NULL;
}

static Pinned *pinned_at(CUdeviceptr address) {
    for (Pinned *each = pinned; each; each = each->next)
        if (address - (CUdeviceptr)each->base < each->nbytes) return each;
    return NULL;
}

/* For the tests. */

void fake_fail_next(const char *name, int code) {
    pthread_mutex_lock(&lock);
    snprintf(failing, sizeof failing, "%s", name);
    failure = code;
    pthread_mutex_unlock(&lock);
}

/* From now on everything fails, as after a kernel that went astray. */
void fake_break(int code) {
    pthread_mutex_lock(&lock);
    broken = code;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

/* Streams begin nothing until they are let go. */
void fake_hold(int hold) {
    pthread_mutex_lock(&lock);
    is_held = hold;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

int fake_count(const char *name) {
    pthread_mutex_lock(&lock);
    return ended(*count_of(name));
}

int fake_current(void) { return current ? current->device : -1; }

void fake_set_current(int device) { current = device < 0 ? NULL : &contexts[device]; }

/* The driver and its devices. */

int cuInit(unsigned flags) {
    const char *fail = getenv("FAKE_CUDA_FAIL");
    pthread_mutex_lock(&lock);
    if (!is_initialized) {
        if (fail) sscanf(fail, "%63[^=]=%d", failing, &failure);
        for (int device = 0; device < MAX_DEVICES; device++) contexts[device].device = device;
    }
    int was_initialized = is_initialized;
    is_initialized = 1;
    int status = refused(__func__);
    is_initialized = was_initialized || !status;
    return ended(flags ? INVALID_VALUE : status);
}

int cuDriverGetVersion(int *version) {
    *version = number_of("FAKE_CUDA_VERSION", 13000);
    return OK;
}

int cuDeviceGetCount(int *count) {
    BEGIN;
    *count = num_devices();
    return ended(OK);
}

int cuDeviceGet(int *device, int ordinal) {
    BEGIN;
    REFUSE(ordinal < 0 || ordinal >= num_devices(), INVALID_DEVICE);
    *device = ordinal;
    return ended(OK);
}

int cuDeviceGetName(char *name, int nbytes, int device) {
    BEGIN;
    snprintf(name, nbytes, "Fake GPU %d", device);
    return ended(OK);
}

/* It has zeros, and bytes beyond 127. */
int cuDeviceGetUuid_v2(Uuid *uuid, int device) {
    BEGIN;
    for (int place = 0; place < 16; place++) uuid->bytes[place] = place * 16 + device;
    return ended(OK);
}

/* The one that knows of no MIG. */
int cuDeviceGetUuid(Uuid *uuid, int device) {
    (void)device;
    BEGIN;
    memset(uuid->bytes, 'x', 16);
    return ended(OK);
}

int cuDeviceTotalMem_v2(size_t *nbytes, int device) {
    (void)device;
    BEGIN;
    *nbytes = MAX_NBYTES;
    return ended(OK);
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    BEGIN;
    REFUSE(attribute != 125 /* IPC_EVENT_SUPPORTED */, INVALID_VALUE);
    *value = !getenv("FAKE_CUDA_NO_IPC");
    return ended(OK);
}

int cuDevicePrimaryCtxRetain(Context **context, int device) {
    BEGIN;
    *context = &contexts[device];
    return ended(OK);
}

int cuCtxGetCurrent(Context **context) {
    BEGIN;
    *context = current;
    return ended(OK);
}

int cuCtxSetCurrent(Context *context) {
    BEGIN;
    current = context;
    return ended(OK);
}

/* Memory. */

static int add_allocation(CUdeviceptr *address, int device, int fd, size_t nbytes, void *where) {
    int flags = MAP_SHARED | (where ? MAP_FIXED : 0);
    void *base = mmap(where, nbytes, PROT_READ | PROT_WRITE, flags, fd, 0);
    Allocation *made = calloc(1, sizeof *made);
    if (base == MAP_FAILED || !made) return OUT_OF_MEMORY;
    *made = (Allocation){allocations, base, nbytes, device, fd, 1, 0};
    allocations = made;
    *address = (CUdeviceptr)base;
    return OK;
}

static int allocate(CUdeviceptr *address, int device, size_t nbytes, void *where) {
    int fd = memfd_create("fake-cuda", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, nbytes)) return OUT_OF_MEMORY;
    return add_allocation(address, device, fd, nbytes, where);
}

/* Two allocations of the first device that happen to be neighbours; the address of the first. */
CUdeviceptr fake_neighbours(size_t nbytes) {
    CUdeviceptr first = 0, second = 0;
    pthread_mutex_lock(&lock);
    char *place = mmap(NULL, 2 * nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    allocate(&first, 0, nbytes, place);
    allocate(&second, 0, nbytes, place + nbytes);
    pthread_mutex_unlock(&lock);
    return first;
}

/* Memory such as that of cudaMallocAsync. */
void fake_make_unshareable(CUdeviceptr address) {
    pthread_mutex_lock(&lock);
    allocation_at(address)->is_shareable = 0;
    pthread_mutex_unlock(&lock);
}

int cuMemAlloc_v2(CUdeviceptr *address, size_t nbytes) {
    BEGIN_IN_CONTEXT;
    REFUSE(!nbytes, INVALID_VALUE);
    REFUSE(nbytes > MAX_NBYTES, OUT_OF_MEMORY);
    return ended(allocate(address, current->device, nbytes, NULL));
}

static int forget(CUdeviceptr address, int is_opened) {
    for (Allocation **link = &allocations; *link; link = &(*link)->next) {
        Allocation *each = *link;
        if ((CUdeviceptr)each->base != address || each->is_opened != is_opened) continue;
        *link = each->next;
        munmap(each->base, each->nbytes);
        close(each->fd);
        free(each);
        return OK;
    }
    return INVALID_VALUE;
}

int cuMemFree_v2(CUdeviceptr address) {
    BEGIN_IN_CONTEXT;
    return ended(forget(address, 0));
}

int cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *nbytes, CUdeviceptr address) {
    BEGIN_IN_CONTEXT;
    Allocation *found = allocation_at(address);
    REFUSE(!found, NOT_FOUND);
    *base = (CUdeviceptr)found->base;
    *nbytes = found->nbytes;
    return ended(OK);
}

int cuPointerGetAttribute(void *value, int attribute, CUdeviceptr address) {
    BEGIN;
    Allocation *found = allocation_at(address);
    REFUSE(!found && !pinned_at(address), INVALID_VALUE);
    if (attribute == 2 /* MEMORY_TYPE */) *(unsigned *)value = found ? DEVICE : HOST;
    else if (attribute == 9 /* DEVICE_ORDINAL */) *(int *)value = found ? found->device : 0;
    else if (attribute == 10 /* IS_LEGACY_CUDA_IPC_CAPABLE */)
        *(char *)value = found && found->is_shareable && !found->is_opened;
    else return ended(INVALID_VALUE);
    return ended(OK);
}

/* Like CUDA's, the handle is that of the whole allocation, whichever address in it is given. */
int cuIpcGetMemHandle(Handle *handle, CUdeviceptr address) {
    BEGIN_IN_CONTEXT;
    struct stat about;
    Allocation *found = allocation_at(address);
    REFUSE(!found || !found->is_shareable || fstat(found->fd, &about), INVALID_VALUE);
    Exported out = {"fakecud", getpid(), found->fd, found->device, found->nbytes, about.st_ino};
    memset(handle, 0, sizeof *handle);
    memcpy(handle, &out, sizeof out);
    return ended(OK);
}

int cuIpcOpenMemHandle_v2(CUdeviceptr *address, Handle handle, unsigned flags) {
    BEGIN_IN_CONTEXT;
    Exported in;
    struct stat about;
    char path[64];
    memcpy(&in, &handle, sizeof in);
    REFUSE(flags != 1 /* LAZY_ENABLE_PEER_ACCESS */, INVALID_VALUE);
    REFUSE(strncmp(in.magic, "fakecud", 8), INVALID_VALUE);
    REFUSE(in.pid == getpid(), INVALID_CONTEXT);
    snprintf(path, sizeof path, "/proc/%ld/fd/%d", (long)in.pid, in.fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    REFUSE(fd < 0, INVALID_HANDLE);
    if (fstat(fd, &about) || about.st_ino != in.inode) {
        close(fd);
        return ended(INVALID_HANDLE);
    }
    status = add_allocation(address, current->device, fd, in.nbytes, NULL);
    if (!status) allocations->is_opened = 1;
    return ended(status);
}

int cuIpcCloseMemHandle(CUdeviceptr address) {
    BEGIN_IN_CONTEXT;
    return ended(forget(address, 1));
}

int cuMemHostRegister_v2(void *address, size_t nbytes, unsigned flags) {
    BEGIN_IN_CONTEXT;
    REFUSE(!nbytes || flags != 1 /* PORTABLE */, INVALID_VALUE);
    REFUSE(pinned_at((CUdeviceptr)address), ALREADY_REGISTERED);
    Pinned *made = malloc(sizeof *made);
    *made = (Pinned){pinned, address, nbytes};
    pinned = made;
    return ended(OK);
}

int cuMemHostUnregister(void *address) {
    BEGIN_IN_CONTEXT;
    for (Pinned **link = &pinned; *link; link = &(*link)->next) {
        Pinned *each = *link;
        if (each->base != address) continue;
        *link = each->next;
        free(each);
        return ended(OK);
    }
    return ended(NOT_REGISTERED);
}

/* Streams and events. */

static void drop(Event *event) {
    if (!--event->owners) free(event);
}

/* Called with the lock, which it lets go while it copies. */
static void perform(Operation *todo) {
    Event *event = todo->event;
    if (todo->kind == COPY) {
        pthread_mutex_unlock(&lock);
        memcpy(todo->target, todo->source, todo->nbytes);
        pthread_mutex_lock(&lock);
        return;
    }
    if (todo->kind == WAIT)
        while (event->over < todo->number) pthread_cond_wait(&changed, &lock);
    else if (event->over < todo->number)
        event->over = todo->number;
    drop(event);
}

static void *work(void *argument) {
    Stream *stream = argument;
    pthread_mutex_lock(&lock);
    while (stream->first || !stream->is_closing) {
        if (is_held || !stream->first) {
            pthread_cond_wait(&changed, &lock);
            continue;
        }
        Operation *todo = stream->first;
        perform(todo);
        stream->first = todo->next;
        if (!stream->first) stream->last = &stream->first;
        stream->done++;
        free(todo);
        pthread_cond_broadcast(&changed);
    }
    pthread_mutex_unlock(&lock);
    free(stream);
    return NULL;
}

static Stream *new_stream(Context *context) {
    pthread_t thread;
    Stream *made = calloc(1, sizeof *made);
    made->context = context;
    made->last = &made->first;
    pthread_create(&thread, NULL, work, made);
    pthread_detach(thread);
    return made;
}

/* The default streams have numbers instead of addresses. */
static Stream *resolved(Stream *stream) {
    if ((uintptr_t)stream > 2) return stream;
    Stream **own = &null_streams[current->device];
    if (!*own) *own = new_stream(current);
    return *own;
}

static void give(Stream *stream, Operation operation) {
    Operation *made = malloc(sizeof *made);
    *made = operation;
    if (operation.event) operation.event->owners++;
    *stream->last = made;
    stream->last = &made->next;
    stream->given++;
    pthread_cond_broadcast(&changed);
}

int cuStreamCreate(Stream **stream, unsigned flags) {
    BEGIN_IN_CONTEXT;
    REFUSE(flags != 1 /* NON_BLOCKING */, INVALID_VALUE);
    *stream = new_stream(current);
    return ended(OK);
}

int cuStreamDestroy_v2(Stream *stream) {
    BEGIN_IN_CONTEXT;
    REFUSE((uintptr_t)stream <= 2, INVALID_HANDLE);
    stream->is_closing = 1;
    pthread_cond_broadcast(&changed);
    return ended(OK);
}

int cuEventCreate(Event **event, unsigned flags) {
    BEGIN_IN_CONTEXT;
    REFUSE(flags != 3 /* BLOCKING_SYNC | DISABLE_TIMING */, INVALID_VALUE);
    *event = calloc(1, sizeof **event);
    **event = (Event){current, 0, 0, 1};
    return ended(OK);
}

int cuEventDestroy_v2(Event *event) {
    BEGIN_IN_CONTEXT;
    drop(event);
    return ended(OK);
}

int cuEventRecord(Event *event, Stream *stream) {
    BEGIN_IN_CONTEXT;
    stream = resolved(stream);
    REFUSE(event->context != stream->context, INVALID_HANDLE);
    give(stream, (Operation){.kind = RECORD, .event = event, .number = ++event->recorded});
    return ended(OK);
}

int cuEventQuery(Event *event) {
    BEGIN_IN_CONTEXT;
    return ended(event->over < event->recorded ? NOT_READY : OK);
}

int cuEventSynchronize(Event *event) {
    BEGIN_IN_CONTEXT;
    uint64_t number = event->recorded;
    event->owners++;
    while (event->over < number && !broken) pthread_cond_wait(&changed, &lock);
    drop(event);
    return ended(broken);
}

int cuStreamWaitEvent(Stream *stream, Event *event, unsigned flags) {
    BEGIN_IN_CONTEXT;
    stream = resolved(stream);
    REFUSE(flags || stream->context != current, INVALID_HANDLE);
    give(stream, (Operation){.kind = WAIT, .event = event, .number = event->recorded});
    return ended(OK);
}

/* Copies. */

/* Whether a range lies in one allocation, or in memory of the host that is no device's. */
static int is_valid(CUdeviceptr address, size_t nbytes) {
    Allocation *found = allocation_at(address);
    return !found || address - (CUdeviceptr)found->base + nbytes <= found->nbytes;
}

static int is_pageable(CUdeviceptr address) {
    return !allocation_at(address) && !pinned_at(address);
}

static void give_copy(Stream *stream, CUdeviceptr target, CUdeviceptr source, size_t nbytes) {
    give(stream, (Operation){
        .kind = COPY, .target = (void *)target, .source = (void *)source, .nbytes = nbytes});
}

int cuMemcpyAsync(CUdeviceptr target, CUdeviceptr source, size_t nbytes, Stream *stream) {
    BEGIN_IN_CONTEXT;
    stream = resolved(stream);
    REFUSE(stream->context != current, INVALID_HANDLE);
    REFUSE(!is_valid(target, nbytes) || !is_valid(source, nbytes), INVALID_VALUE);
    give_copy(stream, target, source, nbytes);
    uint64_t given = stream->given;
    if (is_pageable(target) || is_pageable(source))
        while (stream->done < given) pthread_cond_wait(&changed, &lock);
    return ended(OK);
}

static int copy_batch(CUdeviceptr *targets, CUdeviceptr *sources, size_t *sizes, size_t count,
                      Attributes *attributes, size_t *places, size_t num_places, Stream *stream) {
    if ((uintptr_t)stream < 2 || !count || num_places != 1 || places[0]) return INVALID_VALUE;
    if (attributes->order != 1 /* STREAM */ || attributes->flags) return INVALID_VALUE;
    stream = resolved(stream);
    for (size_t place = 0; place < count; place++) {
        CUdeviceptr target = targets[place], source = sources[place];
        size_t nbytes = sizes[place];
        if (!nbytes || is_pageable(target) || is_pageable(source)) return INVALID_VALUE;
        if (!is_valid(target, nbytes) || !is_valid(source, nbytes)) return INVALID_VALUE;
    }
    for (size_t place = count; place--;)  /* in another order: nobody may count on one */
        give_copy(stream, targets[place], sources[place], sizes[place]);
    return OK;
}

/* Until 12.9. */
int cuMemcpyBatchAsync(CUdeviceptr *targets, CUdeviceptr *sources, size_t *sizes, size_t count,
                       Attributes *attributes, size_t *places, size_t num_places,
                       size_t *failed_place, Stream *stream) {
    BEGIN_IN_CONTEXT;
    *failed_place = SIZE_MAX;
    return ended(copy_batch(
        targets, sources, sizes, count, attributes, places, num_places, stream));
}

/* From 13.0 on. */
int cuMemcpyBatchAsync_v2(CUdeviceptr *targets, CUdeviceptr *sources, size_t *sizes, size_t count,
                          Attributes *attributes, size_t *places, size_t num_places,
                          Stream *stream) {
    BEGIN_IN_CONTEXT;
    return ended(copy_batch(
        targets, sources, sizes, count, attributes, places, num_places, stream));
}

/* Errors, and what cuda-bindings finds the functions by. */

static const struct { int code; const char *name, *text; } errors[] = {
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "already mapped"},
    {NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "not registered"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
};

static int told(int code, const char **text, int is_name) {
    for (size_t place = 0; place < sizeof errors / sizeof *errors; place++)
        if (errors[place].code == code) {
            *text = is_name ? errors[place].name : errors[place].text;
            return OK;
        }
    *text = NULL;
    return INVALID_VALUE;
}

int cuGetErrorName(int code, const char **text) { return told(code, text, 1); }

int cuGetErrorString(int code, const char **text) { return told(code, text, 0); }

int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *how);

/* The newest of a name first, and since which version there is each. */
static const struct { const char *name; int since; void *function; } functions[] = {
    {"cuCtxGetCurrent", 4000, cuCtxGetCurrent},
    {"cuCtxSetCurrent", 4000, cuCtxSetCurrent},
    {"cuDeviceGet", 2000, cuDeviceGet},
    {"cuDeviceGetAttribute", 2000, cuDeviceGetAttribute},
    {"cuDeviceGetCount", 2000, cuDeviceGetCount},
    {"cuDeviceGetName", 2000, cuDeviceGetName},
    {"cuDeviceGetUuid", 11040, cuDeviceGetUuid_v2},
    {"cuDeviceGetUuid", 9020, cuDeviceGetUuid},
    {"cuDevicePrimaryCtxRetain", 7000, cuDevicePrimaryCtxRetain},
    {"cuDeviceTotalMem", 3020, cuDeviceTotalMem_v2},
    {"cuDriverGetVersion", 2020, cuDriverGetVersion},
    {"cuEventCreate", 2000, cuEventCreate},
    {"cuEventDestroy", 4000, cuEventDestroy_v2},
    {"cuEventQuery", 2000, cuEventQuery},
    {"cuEventRecord", 2000, cuEventRecord},
    {"cuEventSynchronize", 2000, cuEventSynchronize},
    {"cuGetErrorName", 6000, cuGetErrorName},
    {"cuGetErrorString", 6000, cuGetErrorString},
    {"cuGetProcAddress", 12000, cuGetProcAddress_v2},
    {"cuInit", 2000, cuInit},
    {"cuIpcCloseMemHandle", 4010, cuIpcCloseMemHandle},
    {"cuIpcGetMemHandle", 4010, cuIpcGetMemHandle},
    {"cuIpcOpenMemHandle", 11000, cuIpcOpenMemHandle_v2},
    {"cuMemAlloc", 3020, cuMemAlloc_v2},
    {"cuMemFree", 3020, cuMemFree_v2},
    {"cuMemGetAddressRange", 3020, cuMemGetAddressRange_v2},
    {"cuMemHostRegister", 6050, cuMemHostRegister_v2},
    {"cuMemHostUnregister", 4000, cuMemHostUnregister},
    {"cuMemcpyAsync", 4000, cuMemcpyAsync},
    {"cuMemcpyBatchAsync", 13000, cuMemcpyBatchAsync_v2},
    {"cuMemcpyBatchAsync", 12080, cuMemcpyBatchAsync},
    {"cuPointerGetAttribute", 4000, cuPointerGetAttribute},
    {"cuStreamCreate", 2000, cuStreamCreate},
    {"cuStreamDestroy", 4000, cuStreamDestroy_v2},
    {"cuStreamWaitEvent", 3020, cuStreamWaitEvent},
};

int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *how) {
    int own = number_of("FAKE_CUDA_VERSION", 13000);
    (void)flags;
    for (size_t place = 0; place < sizeof functions / sizeof *functions; place++) {
        if (strcmp(functions[place].name, name) || functions[place].since > version) continue;
        if (functions[place].since > own || version > own) break;
        *function = functions[place].function;
        if (how) *how = 0;
        return OK;
    }
    *function = NULL;
    if (how) *how = 1;
    return NOT_FOUND;
}
