/*
 * Reductions of two buffers on a GPU, as two GPUs joined by NVLink use them: dst[i] = first[i] op second[i].
 *
 * Compiled at run time by NVRTC (cuda_kernels.c), so it includes nothing; and on the host by tests, which compare it bit by bit
 * with simd/. Its bits are those of simd/: fp16, bf16 and fp8 are computed in float32 and rounded once, to nearest even; what
 * overflows e4m3 is NaN, and infinity in the others; max and min hand NaN on; integers wrap. Sums of floats are scaled before they
 * are rounded: those of an average must not overflow where it would not. Not run on hardware yet.
 *
 * Few blocks are enough to keep up with a link, and leave the GPU to those who compute: threads go over the data in strides of the whole
 * grid, with several loads of 16 bytes in flight each.
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

enum { SUM, PROD, MAX, MIN };

/* ---- float32 and its bits ---- */

union bits32 {
  u32 u;
  float f;
};
__device__ inline float as_float(u32 u) {
  bits32 b;
  b.u = u;
  return b.f;
}
__device__ inline u32 as_bits(float f) {
  bits32 b;
  b.f = f;
  return b.u;
}

/* ---- datatypes: how they are stored, computed with, and turned into each other ---- */

template <class Float>
struct plain {
  enum { FLOATS = 1 };
  typedef Float stored, computed, compared;
  __device__ static Float load(Float x) { return x; }
  __device__ static Float compare(Float x) { return x; }
  __device__ static Float store(Float x) { return x; }
};

/* Sums and products are those of unsigned integers, which wrap. */
template <class Stored, class Unsigned>
struct integer {
  enum { FLOATS = 0 };
  typedef Stored stored, compared;
  typedef Unsigned computed;
  __device__ static Unsigned load(Stored x) { return (Unsigned)x; }
  __device__ static Stored compare(Stored x) { return x; }
  __device__ static Stored store(Unsigned x) { return (Stored)x; }
};

/* Magnitude of the float32 bits `a` (not NaN) rounded to `keep` bits of mantissa, its exponent biased by `bias`. What is too
 * large comes out larger than all finite values. */
__device__ inline u32 narrow(u32 a, int keep, int bias) {
  const int drop = 23 - keep;
  const u32 shift = (u32)(127 - bias) << 23;
  if (a >= shift + (1u << 23)) return (a + ((1u << (drop - 1)) - 1) + ((a >> drop) & 1) - shift) >> drop;
  /* Less than the least normal value: the adder rounds, since the unit of the result is the last bit of this power of two. */
  const u32 magic = shift + ((u32)(drop + 1) << 23);
  return as_bits(as_float(a) + as_float(magic)) - magic;
}

__device__ inline u32 lower(u32 a, u32 b) { return a < b ? a : b; }

struct half16 {
  enum { FLOATS = 1 };
  typedef u16 stored;
  typedef float computed, compared;
  __device__ static float compare(u16 x) { return load(x); }
  __device__ static float load(u16 x) {
    const u32 sign = (u32)(x & 0x8000) << 16, mag = x & 0x7fff;
    if (mag >= 0x7c00) return as_float(sign | 0x7f800000 | (mag & 0x3ff) << 13 | (mag > 0x7c00 ? 0x400000 : 0));
    return as_float(sign | as_bits(as_float(mag << 13) * 0x1p112f)); /* exact, also for subnormal values */
  }
  __device__ static u16 store(float f) {
    const u32 a = as_bits(f) & 0x7fffffff, sign = as_bits(f) >> 16 & 0x8000;
    if (a > 0x7f800000) return (u16)(sign | 0x7e00 | (a >> 13 & 0x3ff));
    return (u16)(sign | lower(narrow(a, 10, 15), 0x7c00));
  }
};

struct brain16 {
  enum { FLOATS = 1 };
  typedef u16 stored;
  typedef float computed, compared;
  __device__ static float compare(u16 x) { return load(x); }
  __device__ static float load(u16 x) { return as_float((u32)x << 16); }
  __device__ static u16 store(float f) {
    const u32 u = as_bits(f);
    if (f != f) return (u16)(u >> 16 | 0x40); /* NaN is cut, and stays one */
    return (u16)((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
};

struct e4m3 { /* no infinity; only 0x7f is NaN */
  enum { FLOATS = 1 };
  typedef u8 stored;
  typedef float computed, compared;
  __device__ static float compare(u8 x) { return load(x); }
  __device__ static float load(u8 x) {
    const u32 sign = (u32)(x & 0x80) << 24, mag = x & 0x7f;
    return as_float(sign | (mag == 0x7f ? 0x7fc00000 : as_bits(as_float(mag << 20) * 0x1p120f)));
  }
  __device__ static u8 store(float f) {
    const u32 a = as_bits(f) & 0x7fffffff, sign = as_bits(f) >> 24 & 0x80;
    return (u8)(sign | (a >= 0x7f800000 ? 0x7f : lower(narrow(a, 3, 7), 0x7f)));
  }
};

struct e5m2 {
  enum { FLOATS = 1 };
  typedef u8 stored;
  typedef float computed, compared;
  __device__ static float compare(u8 x) { return load(x); }
  __device__ static float load(u8 x) {
    const u32 sign = (u32)(x & 0x80) << 24, mag = x & 0x7f;
    if (mag >= 0x7c) return as_float(sign | (mag > 0x7c ? 0x7fc00000 : 0x7f800000));
    return as_float(sign | as_bits(as_float(mag << 21) * 0x1p112f));
  }
  __device__ static u8 store(float f) {
    const u32 a = as_bits(f) & 0x7fffffff, sign = as_bits(f) >> 24 & 0x80;
    return (u8)(sign | (a > 0x7f800000 ? 0x7e : lower(narrow(a, 2, 15), 0x7c)));
  }
};

/* ---- one operation ---- */

template <class D, int Op>
__device__ inline typename D::stored combine(typename D::stored x, typename D::stored y, float scale) {
  if (Op == SUM && D::FLOATS) return D::store((D::load(x) + D::load(y)) * (typename D::computed)scale);
  if (Op == SUM) return D::store(D::load(x) + D::load(y));
  if (Op == PROD) return D::store(D::load(x) * D::load(y));
  const typename D::compared p = D::compare(x), q = D::compare(y);
  /* If neither compares greater the second is taken: of equal values, and of zeros with different signs. */
  return p != p || (Op == MAX ? p > q : p < q) ? x : y;
}

/* ---- the loop ---- */

template <class T>
union vector { /* what a thread moves at once */
  struct alignas(16) {
    u64 a, b;
  } whole;
  T element[16 / sizeof(T)];
};

/* One element at any address. */
template <class T>
__device__ inline T fetch(const u8 *p) {
  union {
    T x;
    u8 byte[sizeof(T)];
  } v;
  for (int i = 0; i < (int)sizeof(T); i++) v.byte[i] = p[i];
  return v.x;
}
template <class T>
__device__ inline void put(u8 *p, T x) {
  union {
    T x;
    u8 byte[sizeof(T)];
  } v;
  v.x = x;
  for (int i = 0; i < (int)sizeof(T); i++) p[i] = v.byte[i];
}

enum { AHEAD = 4 }; /* loads of each buffer that a thread has in flight */

template <class D, int Op>
__device__ inline void reduce(u8 *dst, const u8 *first, const u8 *second, u64 count, float scale) {
  typedef typename D::stored T;
  typedef vector<T> V;
  const u64 per = 16 / sizeof(T), me = (u64)blockIdx.x * blockDim.x + threadIdx.x, all = (u64)gridDim.x * blockDim.x;
  u64 head = count, vectors = 0;
  /* Vectors where all three are aligned alike; what comes before and behind goes element by element, and else everything. */
  if ((((u64)dst ^ (u64)first) | ((u64)dst ^ (u64)second)) % 16 == 0 && (u64)dst % sizeof(T) == 0) {
    head = (16 - (u64)dst % 16) % 16 / sizeof(T);
    if (head > count) head = count;
    vectors = (count - head) / per;
  }
  u8 *const to = dst + head * sizeof(T);
  const u8 *const a = first + head * sizeof(T), *const b = second + head * sizeof(T);
  for (u64 i = me; i < vectors; i += AHEAD * all) {
    V x[AHEAD], y[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; k++)
      if (i + k * all < vectors) {
        x[k].whole = ((const V *)a)[i + k * all].whole;
        y[k].whole = ((const V *)b)[i + k * all].whole;
      }
#pragma unroll
    for (int k = 0; k < AHEAD; k++)
      if (i + k * all < vectors) {
#pragma unroll
        for (int e = 0; e < (int)per; e++) x[k].element[e] = combine<D, Op>(x[k].element[e], y[k].element[e], scale);
        ((V *)to)[i + k * all].whole = x[k].whole;
      }
  }
  const u64 behind = head + vectors * per, rest = count - vectors * per;
  for (u64 i = me; i < rest; i += all) {
    const u64 at = (i < head ? i : behind + (i - head)) * sizeof(T);
    put<T>(dst + at, combine<D, Op>(fetch<T>(first + at), fetch<T>(second + at), scale));
  }
}

/* ---- kernels: hfr_pair_<datatype>_<operation> ---- */

#define KERNEL(name, D, op, Op)                                                                                               \
  extern "C" __global__ void hfr_pair_##name##_##op(u8 *dst, const u8 *first, const u8 *second, u64 count, float scale) {     \
    reduce<D, Op>(dst, first, second, count, scale);                                                                                 \
  }
#define KERNELS(name, ...)            \
  typedef __VA_ARGS__ of_##name;      \
  KERNEL(name, of_##name, sum, SUM)   \
  KERNEL(name, of_##name, prod, PROD) \
  KERNEL(name, of_##name, max, MAX)   \
  KERNEL(name, of_##name, min, MIN)

KERNELS(int8, integer<signed char, u32>)
KERNELS(uint8, integer<u8, u32>)
KERNELS(int32, integer<int, u32>)
KERNELS(uint32, integer<u32, u32>)
KERNELS(int64, integer<long long, u64>)
KERNELS(uint64, integer<u64, u64>)
KERNELS(float16, half16)
KERNELS(float32, plain<float>)
KERNELS(float64, plain<double>)
KERNELS(bfloat16, brain16)
KERNELS(float8_e4m3fn, e4m3)
KERNELS(float8_e5m2, e5m2)
