"""The one part that is compiled; all else stands in pyproject.toml.

Without a C compiler aiomm is installed without it, and copies as libc does.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "aiomm.buffers._memcpy",
            ["aiomm/buffers/_memcpy.c"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
