/* memcpy for what another process will read.
 *
 * An ordinary copy reads every line of the target before it overwrites it, and leaves the line in
 * this processor's caches, which have no use for it. From STREAM_NBYTES on, the copies below stream:
 * their stores go past the caches, so memory is touched two times for each byte instead of three,
 * and what the process works with stays in its caches. libc does the same, but begins only at three
 * quarters of the last cache, which on a server is more than any transfer.
 *
 * Optional: memcpy.py takes libc's copies where nobody has compiled this.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define STREAM_NBYTES (256 * 1024)

#ifdef __SSE2__
#include <emmintrin.h>

#define IS_STREAMING 1
#define LINE_NBYTES 64
#define PAGE_NBYTES 4096
#define NUM_PAGES 4 /* copied side by side: several banks of memory work at once */

static inline void
stream_line(char *target, const char *source)
{
    const __m128i *from = (const __m128i *)source;
    __m128i *to = (__m128i *)target;
    __m128i first = _mm_loadu_si128(from), second = _mm_loadu_si128(from + 1);
    __m128i third = _mm_loadu_si128(from + 2), fourth = _mm_loadu_si128(from + 3);
    _mm_stream_si128(to, first);
    _mm_stream_si128(to + 1, second);
    _mm_stream_si128(to + 2, third);
    _mm_stream_si128(to + 3, fourth);
}

static void
stream(char *target, const char *source, size_t nbytes)
{
    const size_t group = NUM_PAGES * PAGE_NBYTES;
    size_t head = -(uintptr_t)target % LINE_NBYTES;

    memcpy(target, source, head);
    target += head, source += head, nbytes -= head;
    for (; nbytes >= group; target += group, source += group, nbytes -= group)
        for (size_t line = 0; line < PAGE_NBYTES; line += LINE_NBYTES)
            for (size_t at = line; at < group; at += PAGE_NBYTES) {
                _mm_prefetch(source + at + group, _MM_HINT_T0); /* past the end it does nothing */
                stream_line(target + at, source + at);
            }
    for (; nbytes >= LINE_NBYTES;
         target += LINE_NBYTES, source += LINE_NBYTES, nbytes -= LINE_NBYTES)
        stream_line(target, source);
    memcpy(target, source, nbytes);
    _mm_sfence(); /* whoever is told of the copy afterwards finds all of it */
}
#else /* the copies are libc's, but those without the GIL are still made by one call */
#define IS_STREAMING 0
#define stream memcpy
#endif

static void
copy_bytes(char *target, const char *source, size_t nbytes)
{
    if (nbytes < STREAM_NBYTES)
        memcpy(target, source, nbytes);
    else
        stream(target, source, nbytes);
}

static PyObject *
copy(PyObject *const *arguments, Py_ssize_t count, bool keep_gil)
{
    if (count != 3) {
        PyErr_Format(PyExc_TypeError, "wanted target, source, nbytes; got %zd arguments", count);
        return NULL;
    }
    char *target = PyLong_AsVoidPtr(arguments[0]);
    const char *source = PyLong_AsVoidPtr(arguments[1]);
    size_t nbytes = PyLong_AsSize_t(arguments[2]);
    if (PyErr_Occurred())
        return NULL;
    PyThreadState *state = keep_gil ? NULL : PyEval_SaveThread();
    copy_bytes(target, source, nbytes);
    if (state != NULL)
        PyEval_RestoreThread(state);
    Py_RETURN_NONE;
}

static PyObject *
copy_with_gil(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    return copy(arguments, count, true);
}

static PyObject *
copy_without_gil(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    return copy(arguments, count, false);
}

typedef struct {
    uint64_t target, source, nbytes;
} Copy;

static PyObject *
copy_shared(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    Py_buffer copies, next;

    if (count != 2) {
        PyErr_Format(PyExc_TypeError, "wanted copies, next; got %zd arguments", count);
        return NULL;
    }
    if (PyObject_GetBuffer(arguments[0], &copies, PyBUF_SIMPLE) != 0)
        return NULL;
    if (PyObject_GetBuffer(arguments[1], &next, PyBUF_WRITABLE) != 0) {
        PyBuffer_Release(&copies);
        return NULL;
    }
    if (copies.len % sizeof(Copy) != 0 || next.len != sizeof(uint64_t)) {
        PyErr_SetString(PyExc_ValueError, "copies are three numbers of 8 bytes each, next is one");
    } else {
        const Copy *all = copies.buf;
        const uint64_t num_copies = copies.len / sizeof(Copy);
        _Atomic uint64_t *taken = next.buf;
        Py_BEGIN_ALLOW_THREADS
        for (uint64_t at; (at = atomic_fetch_add(taken, 1)) < num_copies;)
            copy_bytes((char *)all[at].target, (const char *)all[at].source, all[at].nbytes);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&next);
    PyBuffer_Release(&copies);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"copy_with_gil", (PyCFunction)(void (*)(void))copy_with_gil, METH_FASTCALL,
     "copy_with_gil(target, source, nbytes)\n--\n\nCopy bytes from address to address."},
    {"copy_without_gil", (PyCFunction)(void (*)(void))copy_without_gil, METH_FASTCALL,
     "copy_without_gil(target, source, nbytes)\n--\n\nDo the same; other threads run meanwhile."},
    {"copy_shared", (PyCFunction)(void (*)(void))copy_shared, METH_FASTCALL,
     "copy_shared(copies, next)\n--\n\n"
     "Make the copies that no other thread takes, without the GIL, until all are taken.\n\n"
     "Each is three numbers: target, source, nbytes. `next` counts, from 0, those taken."},
    {NULL, NULL, 0, NULL},
};

static int
add_constants(PyObject *module)
{
    return PyModule_AddIntConstant(module, "IS_STREAMING", IS_STREAMING);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)add_constants},
    {0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_memcpy",
    .m_doc = "Copies that go past the caches.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC
PyInit__memcpy(void)
{
    return PyModuleDef_Init(&definition);
}
