"""csrc/xla_abi.h against the header that the installed jaxlib carries: layouts and codes, by the compiler."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastedit import _native

ROOT = Path(__file__).resolve().parents[2]
CXX = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

# Ours: (theirs, {our field: theirs}). Every field that we declare is named, so that none can slip.
HEAD = {"size": "struct_size", "extensions": "extension_start"}
STRUCTS = {
    "Extension": ("XLA_FFI_Extension_Base", {"size": "struct_size", "kind": "type", "next": "next"}),
    "Version": ("XLA_FFI_Api_Version", HEAD | {"major": "major_version", "minor": "minor_version"}),
    "CreateError": ("XLA_FFI_Error_Create_Args", HEAD | {"message": "message", "code": "errc"}),
    "GetStream": ("XLA_FFI_Stream_Get_Args", HEAD | {"context": "ctx", "stream": "stream"}),
    "Api": (
        "XLA_FFI_Api",
        HEAD | {
            "version": "api_version", "internal": "internal_api", "create_error": "XLA_FFI_Error_Create",
            "error_message": "XLA_FFI_Error_GetMessage", "destroy_error": "XLA_FFI_Error_Destroy",
            "register_handler": "XLA_FFI_Handler_Register", "get_stream": "XLA_FFI_Stream_Get",
        },
    ),
    "Buffer": ("XLA_FFI_Buffer", HEAD | {"type": "dtype", "data": "data", "rank": "rank", "dims": "dims"}),
    "Buffers": ("XLA_FFI_Args", HEAD | {"count": "size", "kinds": "types", "items": "args"}),
    "Name": ("XLA_FFI_ByteSpan", {"text": "ptr", "length": "len"}),
    "Scalar": ("XLA_FFI_Scalar", {"type": "dtype", "value": "value"}),
    "Attributes": (
        "XLA_FFI_Attrs", HEAD | {"count": "size", "kinds": "types", "names": "names", "values": "attrs"}
    ),
    "CallFrame": (
        "XLA_FFI_CallFrame",
        HEAD | {
            "api": "api", "context": "ctx", "stage": "stage", "arguments": "args", "results": "rets",
            "attributes": "attrs",
        },
    ),
    "Metadata": ("XLA_FFI_Metadata", {"size": "struct_size", "version": "api_version", "traits": "traits"}),
    "MetadataExtension": ("XLA_FFI_Metadata_Extension", {"head": "extension_base", "metadata": "metadata"}),
}  # fmt: skip
RESULTS = {"count": "size", "kinds": "types", "items": "rets"}  # Buffers again
CODES = {
    "U8": "XLA_FFI_DataType_U8", "S32": "XLA_FFI_DataType_S32", "S64": "XLA_FFI_DataType_S64",
    "F16": "XLA_FFI_DataType_F16", "F32": "XLA_FFI_DataType_F32", "BF16": "XLA_FFI_DataType_BF16",
    "kInvalidArgument": "XLA_FFI_Error_Code_INVALID_ARGUMENT",
    "kResourceExhausted": "XLA_FFI_Error_Code_RESOURCE_EXHAUSTED",
    "kOutOfRange": "XLA_FFI_Error_Code_OUT_OF_RANGE", "kInternal": "XLA_FFI_Error_Code_INTERNAL",
    "kBuffer": "XLA_FFI_ArgType_BUFFER", "kScalar": "XLA_FFI_AttrType_SCALAR",
    "kMetadata": "XLA_FFI_Extension_Metadata",
    "kCommandBuffer": "XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE", "kMajor": "XLA_FFI_API_MAJOR",
}  # fmt: skip


def asserts():
    for ours, (theirs, fields) in STRUCTS.items():
        for field, other in fields.items():
            yield _same_place(ours, field, theirs, other)
    for field, other in (HEAD | RESULTS).items():
        yield _same_place("Buffers", field, "XLA_FFI_Rets", other)
    yield "static_assert(sizeof(xla::CallFrame) == XLA_FFI_CallFrame_STRUCT_SIZE);"
    yield "static_assert(XLA_FFI_ArgType_BUFFER == int(XLA_FFI_RetType_BUFFER));"
    for ours, theirs in CODES.items():
        yield f"static_assert(static_cast<int>(xla::{ours}) == static_cast<int>({theirs}));"


def _same_place(ours, field, theirs, other):
    return (
        f"static_assert(offsetof(xla::{ours}, {field}) == offsetof({theirs}, {other}) && "
        f"sizeof(xla::{ours}::{field}) == sizeof({theirs}::{other}));"
    )


def compile_asserts(lines, folder):
    jax = pytest.importorskip("jax", reason="needs jaxlib's header: pip install jax")
    source = folder / "layouts.cpp"
    head = '#include "xla_abi.h"\n#include "xla/ffi/api/c_api.h"\nnamespace xla = fastedit::xla;\n'
    source.write_text(head + "\n".join(lines))
    if CXX is None:
        pytest.skip("needs a C++ compiler")
    include = [f"-I{ROOT / 'csrc'}", f"-I{jax.ffi.include_dir()}"]
    return subprocess.run(
        [CXX, "-std=c++20", "-fsyntax-only", *include, str(source)], capture_output=True, text=True
    )


def test_layouts_and_codes_are_those_of_the_installed_jaxlib(tmp_path):
    done = compile_asserts(asserts(), tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_declared_field_is_held_against_theirs():
    """A struct or field added to the header must be added above, and the compiler sees a wrong one."""
    text = re.sub(r"//.*", "", (ROOT / "csrc" / "xla_abi.h").read_text())
    declared = {name: fields_of(body) for name, body in re.findall(r"struct (\w+) \{(.*?)\};", text, re.S)}
    assert declared == {name: set(fields) for name, (_, fields) in STRUCTS.items()}
    codes = set(re.findall(r"(\w+) = \d+u?[,; ]", text)) - {"kOldestMinor", "kNewestMinor"}
    assert codes == set(CODES)


def fields_of(body):
    """Names declared in a struct: the last word of each declarator, or the one in (*name)(…)."""
    body = re.sub(r"\(\*(\w+)\)\([^)]*\)", r"\1", body)
    return {one.split()[-1].strip("*") for line in body.split(";") if line.strip() for one in line.split(",")}


def test_the_compiler_sees_a_wrong_layout(tmp_path):
    done = compile_asserts([_same_place("Buffer", "data", "XLA_FFI_Buffer", "rank")], tmp_path)
    assert done.returncode != 0 and "static assertion failed" in done.stderr


# --- the metadata query, as XLA would make it ------------------------------------------------------------------


class Head(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("extensions", ctypes.c_void_p)]


class Api(ctypes.Structure):
    _fields_ = [("head", Head), ("version_head", Head), ("major", ctypes.c_int32), ("minor", ctypes.c_int32)]
    _fields_ += [("functions", ctypes.c_void_p * 6)]


class Metadata(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("version_head", Head), ("major", ctypes.c_int32), ("minor", ctypes.c_int32)]
    _fields_ += [("traits", ctypes.c_uint32)]


class Extension(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("kind", ctypes.c_int32), ("next", ctypes.c_void_p)]
    _fields_ += [("metadata", ctypes.POINTER(Metadata))]


class Frame(ctypes.Structure):
    _fields_ = [("head", Head), ("api", ctypes.POINTER(Api)), ("rest", ctypes.c_void_p * 18)]


def answer(handler, api, frame_size=None):
    """(major, minor), traits of the handler in the capsule."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    call = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(Frame))(pointer(handler, None))
    metadata = Metadata(36)
    extension = Extension(ctypes.sizeof(Extension), 1, None, ctypes.pointer(metadata))
    frame = Frame(Head(frame_size or ctypes.sizeof(Frame), ctypes.addressof(extension)), api and ctypes.pointer(api))
    assert not call(ctypes.byref(frame))
    return (metadata.major, metadata.minor), metadata.traits


def xla(major, minor, size=None):
    return Api(Head(size or ctypes.sizeof(Api)), Head(), major, minor)


@pytest.mark.parametrize(
    "api, frame_size, expected",
    [
        (None, None, (0, 1)),  # the oldest pass no api
        (xla(0, 1), None, (0, 1)),
        (xla(0, 2), None, (0, 2)),
        (xla(0, 9), None, (0, 3)),  # newer than this file: what we know, for XLA to serve or refuse
        (xla(1, 0), None, (0, 3)),
        (xla(0, 3, size=64), None, (0, 0)),  # too short for what the handlers use: refused at registration
        (xla(0, 3), 64, (0, 0)),
    ],
)
def test_the_handlers_answer_for_their_version(api, frame_size, expected):
    handlers = _native.xla_handlers()
    served = [op for platform, op, _ in handlers if platform == "cpu"]
    assert served == [op for op in _native.OPS if op not in ("moments", "value_ascent")]
    for platform, _, handler in handlers:
        version, traits = answer(handler, api, frame_size)
        assert version == expected
        assert traits == (1 if platform == "CUDA" and expected != (0, 0) else 0)
