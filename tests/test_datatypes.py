"""The datatypes against ml_dtypes and numpy: every fp8, fp16 and bf16 value, every place where rounding changes, and reductions."""

from __future__ import annotations

import ctypes
import platform
import shutil

import pytest
from programs import BUILD_LIMIT, ROOT, build, building, need_compiler

np = pytest.importorskip("numpy")
ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is the reference for fp8 and bf16; it is not installed")

# NaN and overflow are what is tested.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.limit(BUILD_LIMIT + 60)]
SHARED = True  # many small tests

LEVELS = ("scalar", "neon") if platform.machine() == "aarch64" else ("scalar", "avx2", "avx512")
# hfreduceDataType_t -> numpy dtype
DTYPES = {
    0: np.dtype(np.int8),
    1: np.dtype(np.uint8),
    2: np.dtype(np.int32),
    3: np.dtype(np.uint32),
    4: np.dtype(np.int64),
    5: np.dtype(np.uint64),
    6: np.dtype(np.float16),
    7: np.dtype(np.float32),
    8: np.dtype(np.float64),
    9: np.dtype(ml_dtypes.bfloat16),
    10: np.dtype(ml_dtypes.float8_e4m3fn),
    11: np.dtype(ml_dtypes.float8_e5m2),
}
SMALL = (6, 9, 10, 11)
FLOATS = (6, 7, 8, 9, 10, 11)
NAMES = {code: dtype.name for code, dtype in DTYPES.items()}


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compile csrc/simd and what it stands on with exported wrappers, and load it."""
    need_compiler()
    files = [path for room in ("simd", "call", "base") for path in sorted((ROOT / "csrc" / room).glob("*.c"))]
    with building("plain") as out:  # the objects are those of the C programs
        objects = build.compile_objects(out, [*files, ROOT / "tests" / "c" / "simd_export.c"])
        target = build.link_shared(out / "libsimd_test.so", objects, [], sanitize="", cc=None)
        own = tmp_path_factory.mktemp("simd") / target.name  # nobody links this one anew
        shutil.copy(target, own)
    lib = ctypes.CDLL(str(own))
    lib.test_level.restype = lib.test_dtype_name.restype = ctypes.c_char_p
    lib.test_reduce.argtypes = (
        [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
        + [ctypes.c_int] * 3
        + [ctypes.c_double, ctypes.c_uint64]
    )
    lib.test_reduce.restype = None
    lib.test_convert.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    return lib


@pytest.fixture(params=LEVELS)
def level(library: ctypes.CDLL, request: pytest.FixtureRequest) -> ctypes.CDLL:
    """The library with one level selected."""
    if not library.test_select(request.param.encode()):
        pytest.skip(f"this CPU or build has no {request.param}")
    return library


def convert(lib: ctypes.CDLL, x: np.ndarray, src: int, dst: int) -> np.ndarray:
    out = np.empty(x.shape, DTYPES[dst])
    assert lib.test_convert(out.ctypes.data, dst, x.ctypes.data, src, x.size) == 0
    return out


def reduce(
    lib: ctypes.CDLL, sources: list[np.ndarray], code: int, op: int, npre: int = 0, pre: float = 0.0, div: int = 0
) -> np.ndarray:
    out = np.empty_like(sources[0])
    pointers = (ctypes.c_void_p * len(sources))(*[s.ctypes.data for s in sources])
    lib.test_reduce(out.ctypes.data, ctypes.cast(pointers, ctypes.c_void_p), len(sources), out.size, code, op, npre, pre, div)
    return out


def bits(x: np.ndarray) -> np.ndarray:
    return x.view(np.dtype(f"u{x.dtype.itemsize}"))


def assert_same(got: np.ndarray, want: np.ndarray) -> None:
    """Equal bits, but any NaN is as good as another."""
    wrong = (bits(got) != bits(want)) & ~(np.isnan(got.astype(np.float64)) & np.isnan(want.astype(np.float64)))
    where = np.flatnonzero(wrong)[:5]
    assert not where.size, [(int(i), hex(bits(got)[i]), hex(bits(want)[i])) for i in where]


def every_value(code: int) -> np.ndarray:
    size = DTYPES[code].itemsize
    return np.arange(1 << (8 * size), dtype=f"u{size}").view(DTYPES[code])


def rounding_places(code: int) -> np.ndarray:
    """Every finite value, the middle to its neighbour, and the float32 values on both sides of each, up to well beyond overflow."""
    finite = np.sort(every_value(code).astype(np.float64))
    finite = np.unique(finite[np.isfinite(finite)])
    beyond = finite[-1] + (finite[-1] - finite[-2]) * np.array([1.0, 2.0, 3.0, 100.0])
    finite = np.concatenate([-beyond[::-1], finite, beyond])
    with np.errstate(over="ignore"):
        points = np.concatenate([finite, (finite[1:] + finite[:-1]) / 2]).astype(np.float32)
        points = np.concatenate([np.nextafter(points, np.float32(-np.inf)), points, np.nextafter(points, np.float32(np.inf))])
    return np.concatenate([points, np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3.4e38], np.float32)])


def test_the_public_table_is_numpys() -> None:
    """What hfreduceTypeGet says of each type, and what Python made of it."""
    from hfreduce._ffi import ffi, lib
    from hfreduce.types import DTYPE_NAMES, TYPES, dtype_code, numpy_dtype

    assert list(TYPES) == list(DTYPES) and tuple(NAMES.values()) == DTYPE_NAMES
    for code, dtype in DTYPES.items():
        said = TYPES[code]
        assert (said.name, said.size, said.is_float) == (dtype.name, dtype.itemsize, code in FLOATS)
        assert said.factor == (7 if dtype.name.startswith("float8") else code)
        assert numpy_dtype(code) == dtype and dtype_code(dtype) == dtype_code(said.name) == code
    one = ffi.new("hfreduceType_t *")
    for code in DTYPES:
        assert lib.hfreduceTypeGet(code, one) == lib.hfreduceSuccess
        assert one.computed == (7 if code in SMALL else code) and one.ops == 0b11111
    assert lib.hfreduceTypeGet(-1, one) == lib.hfreduceTypeGet(lib.hfreduceTypeCount(), one) == lib.hfreduceInvalidArgument
    assert lib.hfreduceTypeGet(0, ffi.NULL) == lib.hfreduceInvalidArgument


def test_names(library: ctypes.CDLL) -> None:
    for code, dtype in DTYPES.items():
        assert library.test_dtype_name(code).decode() == dtype.name


@pytest.mark.parametrize("code", SMALL, ids=NAMES.get)
def test_decode_every_value(level: ctypes.CDLL, code: int) -> None:
    x = every_value(code)
    assert_same(convert(level, x, code, 7), x.astype(np.float32))
    assert_same(convert(level, x, code, 8), x.astype(np.float64))


@pytest.mark.parametrize("code", SMALL, ids=NAMES.get)
def test_encode_every_rounding(level: ctypes.CDLL, code: int) -> None:
    x = rounding_places(code)
    assert_same(convert(level, x, 7, code), x.astype(DTYPES[code]))
    if code in (10, 11):
        # every upper half of a float32, NaN included: canonical with its sign, as ml_dtypes has it
        upper = np.arange(1 << 16, dtype=np.uint32) << 16
        x = np.concatenate([upper, upper | 1]).view(np.float32)
        assert np.array_equal(bits(convert(level, x, 7, code)), bits(x.astype(DTYPES[code])))


@pytest.mark.parametrize("code", SMALL, ids=NAMES.get)
def test_scaled_every_value(level: ctypes.CDLL, code: int) -> None:
    """The rounding inside a reduction, on products with arbitrary float32 mantissas."""
    x = every_value(code)
    for factor in np.random.default_rng(3).normal(size=20 if x.size > 256 else 2000).astype(np.float32):
        got = reduce(level, [x], code, 0, npre=1, pre=float(factor))
        assert_same(got, (x.astype(np.float32) * factor).astype(DTYPES[code]))


@pytest.mark.parametrize("dst", FLOATS, ids=NAMES.get)
@pytest.mark.parametrize("src", FLOATS, ids=NAMES.get)
def test_convert_matches_numpy(level: ctypes.CDLL, src: int, dst: int) -> None:
    x = rounding_places(9).astype(DTYPES[src]) if src in (7, 8) else every_value(src)
    want = x.astype(np.float32).astype(DTYPES[dst]) if dst != 8 else x.astype(np.float64)
    assert_same(convert(level, x, src, dst), want)


@pytest.mark.parametrize("op", range(4), ids=["sum", "prod", "max", "min"])
@pytest.mark.parametrize("code", (10, 11), ids=NAMES.get)
def test_fp8_every_pair(level: ctypes.CDLL, code: int, op: int) -> None:
    a, b = (g.ravel() for g in np.meshgrid(every_value(code), every_value(code)))
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    function = (np.add, np.multiply, np.maximum, np.minimum)[op]
    want = function(a.astype(np.float32), b.astype(np.float32))
    if op >= 2:  # which zero wins is unspecified in numpy; ours is the second operand
        want = np.where((want == 0) & (a.astype(np.float32) == b.astype(np.float32)), b.astype(np.float32), want)
    assert_same(reduce(level, [a, b], code, op), want.astype(DTYPES[code]))


@pytest.mark.parametrize("nsrc", (2, 3, 8))
@pytest.mark.parametrize("op", range(4), ids=["sum", "prod", "max", "min"])
@pytest.mark.parametrize("code", DTYPES, ids=NAMES.get)
def test_reduce_near_float64(level: ctypes.CDLL, code: int, op: int, nsrc: int) -> None:
    rng = np.random.default_rng(7)
    dtype = DTYPES[code]
    function = (np.add, np.multiply, np.maximum, np.minimum)[op]
    if code in FLOATS:
        sources = [rng.uniform(0.5, 1.5, 5003).astype(dtype) for _ in range(nsrc)]
        want = function.reduce([s.astype(np.float64) for s in sources])
        # one rounding to the datatype, after at most nsrc to the accumulation type
        unit = 2.0 ** -{6: 11, 7: 24, 8: 53, 9: 8, 10: 4, 11: 3}[code]
        slack = unit * 1.01 + nsrc * (2.0**-24 if code != 8 else 2.0**-53)
        got = reduce(level, sources, code, op).astype(np.float64)
        assert np.max(np.abs(got - want) / want) <= slack
    else:
        info = np.iinfo(dtype)
        sources = [rng.integers(info.min, info.max, 5003, dtype=dtype, endpoint=True) for _ in range(nsrc)]
        want = sources[0]
        for s in sources[1:]:
            want = function(want, s, dtype=dtype)
        assert np.array_equal(reduce(level, sources, code, op), want)


@pytest.mark.parametrize("div", (2, 3, 7, 300))
@pytest.mark.parametrize("code", DTYPES, ids=NAMES.get)
def test_average(level: ctypes.CDLL, code: int, div: int) -> None:
    rng = np.random.default_rng(11)
    dtype = DTYPES[code]
    if code in FLOATS:
        wide = np.float64 if code == 8 else np.float32
        sources = [rng.normal(size=777).astype(dtype) for _ in range(3)]
        total = (sources[0].astype(wide) + sources[1].astype(wide)) + sources[2].astype(wide)
        want = (total / wide(div)).astype(dtype)
    else:
        info = np.iinfo(dtype)
        sources = [rng.integers(info.min // 4, info.max // 4, 777, dtype=dtype) for _ in range(3)]
        total = sources[0] + sources[1] + sources[2]
        want = np.array([(abs(int(t)) // div) * (1 if t >= 0 else -1) for t in total], dtype=dtype)
    got = reduce(level, sources, code, 0, div=div)
    if code in FLOATS:
        assert_same(got, want)
    else:
        assert np.array_equal(got, want)
