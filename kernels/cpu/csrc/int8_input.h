// Quantizes inputs to bytes for INT8 activation quantization (kernels/compute/int8.py).
//
//     s = hi / 255 - lo / 255,    z = round(-lo / s),    x_q = clamp(round(x / s) + z, 0, 255)
//
// Codes are stored channels fastest, in whole words of four per pixel. A convolution's padding is filled with z.
#pragma once

#include <cmath>

#include "floats.h"

#if defined(WIDE_VECTORS) && defined(__AVX512VNNI__)
#define HAS_INT8 1

namespace {

constexpr int64_t PIECE = 256;  // pixels whose codes stay in the cache
constexpr uint32_t INFINITE = 0x7f800000, NEGATIVE = 0x80000000;

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// How a convolution reads its padded input and writes its output. Always 3 dimensions; unused ones have size 1.
struct Plan {
    int64_t samples, channels, out;
    int64_t size[3], kernel[3], stride[3], padding[3], dilation[3];
    int64_t by_position, planar, channels_last;

    int64_t pitch() const { return round_up(channels, 4); }
    int64_t padded(int i) const { return size[i] + 2 * padding[i]; }
    int64_t steps(int i) const { return (padded(i) - dilation[i] * (kernel[i] - 1) - 1) / stride[i] + 1; }
    int64_t pixels() const { return size[0] * size[1] * size[2]; }
    int64_t positions() const { return steps(0) * steps(1) * steps(2); }
    int64_t sample_bytes() const { return padded(0) * padded(1) * padded(2) * pitch(); }
    int64_t grids() const { return by_position ? samples * pixels() : samples; }
};

// Scales and zero points: one per sample or per pixel.
struct Grids {
    float* scale;
    int32_t* zero;

    Grids from(int64_t i) const { return {scale + i, zero + i}; }

    // hi and lo as bits. NaN if either is not finite; a zero point exceeds 255 only for subnormal values.
    void set(int64_t i, int32_t hi, uint32_t lo) const {
        const bool finite = hi < int32_t(INFINITE) && lo < (NEGATIVE | INFINITE);
        const float high = as_float(uint32_t(hi)), low = as_float(lo);
        const float range = high / 255.0f - low / 255.0f, step = range == 0 ? 1.0f : range;
        const float from = std::nearbyint(-low / step);
        scale[i] = finite ? step : as_float(0x7fc00000);
        zero[i] = finite ? int32_t(from < 255.0f ? from : 255.0f) : 0;
    }
};

// The maximum and minimum of each lane, zero included, as bits: as signed integers, positive floats are in order and negative
// ones below them; as unsigned integers, negative floats are in order and above the rest. NaN exceeds the infinity of its sign.
struct Range {
    __m512i hi = _mm512_setzero_si512(), lo = _mm512_set1_epi32(int32_t(NEGATIVE));

    void take(__m512 x) {
        hi = _mm512_max_epi32(hi, _mm512_castps_si512(x));
        lo = _mm512_max_epu32(lo, _mm512_castps_si512(x));
    }
    void take(const Range& other) {
        hi = _mm512_max_epi32(hi, other.hi);
        lo = _mm512_max_epu32(lo, other.lo);
    }
    int32_t highest() const { return _mm512_reduce_max_epi32(hi); }
    uint32_t lowest() const { return _mm512_reduce_max_epu32(lo); }
};

template <class T>
ALWAYS_INLINE Range range_of(const T* x, int64_t length) {
    Range parts[4];
    int64_t i = 0;
    for (; i + 64 <= length; i += 64)
        for (int j = 0; j < 4; j++) parts[j].take(load16(x + i + 16 * j, 0xffff));
    for (; i < length; i += 16) parts[0].take(load16(x + i, first_lanes(length - i)));
    for (int j = 1; j < 4; j++) parts[0].take(parts[j]);
    return parts[0];
}

// round(x / scale), to nearest even, + zero, in [0, 255]. A product is faster than a division and errs by less than 2^-14 here,
// so only values that close to a tie are divided.
struct Quantizer {
    __m512 scale, inverse, zero;
    bool simple;

    Quantizer(__m512 s, __m512 inverse, __m512 z)
        : scale(s),
          inverse(inverse),
          zero(z),
          simple((_mm512_cmp_ps_mask(s, _mm512_set1_ps(1e-30f), _CMP_GT_OQ) &
                  _mm512_cmp_ps_mask(s, _mm512_set1_ps(1e30f), _CMP_LT_OQ)) == 0xffff) {}

    static Quantizer of_all(const Grids& grids) {
        const float s = *grids.scale;
        return {_mm512_set1_ps(s), _mm512_set1_ps(1 / s), _mm512_set1_ps(float(*grids.zero))};
    }

    static Quantizer of_each(const Grids& grids, __mmask16 lanes) {
        const __m512 one = _mm512_set1_ps(1), s = _mm512_mask_loadu_ps(one, lanes, grids.scale);
        return {s, _mm512_div_ps(one, s), _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(lanes, grids.zero))};
    }

    __m512i operator()(__m512 x) const {
        constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        const __m512 code = _mm512_fmadd_ps(x, inverse, zero), rest = _mm512_abs_ps(_mm512_reduce_ps(code, nearest));
        __m512i whole = _mm512_cvtps_epi32(code);
        if (!simple || _mm512_cmp_ps_mask(rest, _mm512_set1_ps(0.5f - 0x1p-13f), _CMP_GE_OQ))
            whole = _mm512_cvtps_epi32(_mm512_add_ps(_mm512_roundscale_ps(_mm512_div_ps(x, scale), nearest), zero));
        return _mm512_min_epi32(_mm512_max_epi32(whole, _mm512_setzero_si512()), _mm512_set1_epi32(255));
    }
};

template <class T>
ALWAYS_INLINE void quantize_row(const T* x, int64_t length, int64_t padded, const Quantizer& quantizer, uint8_t* to) {
    for (int64_t i = 0; i < padded; i += 16) {
        const __mmask16 lanes = first_lanes(length > i ? length - i : 0);
        __m128i codes = _mm512_cvtepi32_epi8(quantizer(load16(x + i, lanes)));
        _mm_mask_storeu_epi8(to + i, first_lanes(padded - i), codes);
    }
}

// 16 pixels of 16 channels, channels `stride` apart -> 16 adjacent bytes per pixel
template <class T>
void turn_block(const T* x, int64_t stride, int64_t channels, int64_t pixels, const Quantizer& quantizer, uint8_t* to,
                int64_t pitch) {
    const __mmask16 lanes = first_lanes(pixels);
    __m512i four[4];
    for (int j = 0; j < 4; j++) {
        __m512i word = _mm512_setzero_si512();
        for (int i = 0; i < 4; i++) {
            const int64_t c = 4 * j + i;
            if (c < channels) {
                __m512i code = quantizer(load16(x + c * stride, lanes));
                word = _mm512_or_si512(word, _mm512_sll_epi32(code, _mm_cvtsi32_si128(8 * i)));
            }
        }
        four[j] = word;
    }
    const __m512i a = _mm512_unpacklo_epi32(four[0], four[1]), b = _mm512_unpackhi_epi32(four[0], four[1]);
    const __m512i c = _mm512_unpacklo_epi32(four[2], four[3]), d = _mm512_unpackhi_epi32(four[2], four[3]);
    alignas(64) uint8_t turned[4][64];  // [pixel % 4][pixel / 4][channel]
    _mm512_store_si512(turned[0], _mm512_unpacklo_epi64(a, c));
    _mm512_store_si512(turned[1], _mm512_unpackhi_epi64(a, c));
    _mm512_store_si512(turned[2], _mm512_unpacklo_epi64(b, d));
    _mm512_store_si512(turned[3], _mm512_unpackhi_epi64(b, d));
    const __mmask16 bytes = first_lanes(round_up(channels, 4));
    for (int64_t p = 0; p < pixels; p++) {
        __m128i run = _mm_load_si128(reinterpret_cast<const __m128i*>(turned[p % 4] + p / 4 * 16));
        _mm_mask_storeu_epi8(to + p * pitch, bytes, run);
    }
}

// `pixels` pixels of all channels; `quantizer_of` gives the quantizer for the 16 pixels from a given one on.
template <class T, class Of>
void turn_pixels(const T* x, int64_t stride, int64_t channels, int64_t pixels, Of quantizer_of, uint8_t* to,
                 int64_t pitch) {
    for (int64_t at = 0; at < pixels; at += PIECE)
        for (int64_t c = 0; c < channels; c += 16)
            for (int64_t w = at; w < least(at + PIECE, pixels); w += 16)
                turn_block(x + c * stride + w, stride, least(16, channels - c), least(16, pixels - w), quantizer_of(w),
                           to + w * pitch + c, pitch);
}

template <class T>
void quantize_rows(const Plan& p, const T* x, uint8_t* codes, const Grids& grids, int threads) {
    const int64_t rows = p.samples * p.pixels(), pitch = p.pitch();
    PARALLEL_FOR(threads)
    for (int64_t m = 0; m < rows; m++) {
        const T* row = x + m * p.channels;
        const Range range = range_of(row, p.channels);
        grids.set(m, range.highest(), range.lowest());
        quantize_row(row, p.channels, pitch, Quantizer::of_all(grids.from(m)), codes + m * pitch);
    }
}

// Grids of up to PIECE pixels, channels `stride` apart.
template <class T>
void find_grids(const T* x, int64_t stride, int64_t channels, int64_t pixels, const Grids& grids) {
    Range ranges[PIECE / 16];
    for (int64_t c = 0; c < channels; c += 16)
        for (int64_t w = 0; w < pixels; w += 16) {
            Range range = ranges[w / 16];
            for (int64_t i = c; i < least(c + 16, channels); i++)
                range.take(load16(x + i * stride + w, first_lanes(pixels - w)));
            ranges[w / 16] = range;
        }
    int32_t hi[PIECE];
    uint32_t lo[PIECE];
    for (int64_t w = 0; w < pixels; w += 16) {
        _mm512_storeu_si512(hi + w, ranges[w / 16].hi);
        _mm512_storeu_si512(lo + w, ranges[w / 16].lo);
    }
    for (int64_t w = 0; w < pixels; w++) grids.set(w, hi[w], lo[w]);
}

template <class T>
void quantize_pixels(const Plan& p, const T* x, uint8_t* codes, const Grids& grids, int threads) {
    const int64_t pixels = p.pixels(), pieces = (pixels + PIECE - 1) / PIECE;
    PARALLEL_FOR(threads)
    for (int64_t i = 0; i < p.samples * pieces; i++) {
        const int64_t b = i / pieces, first = i % pieces * PIECE, count = least(PIECE, pixels - first);
        const T* from = x + b * p.channels * pixels + first;
        const Grids own = grids.from(b * pixels + first);
        find_grids(from, pixels, p.channels, count, own);
        const auto each = [&](int64_t w) { return Quantizer::of_each(own.from(w), first_lanes(count - w)); };
        turn_pixels(from, pixels, p.channels, count, each, codes + (b * pixels + first) * p.pitch(), p.pitch());
    }
}

template <class T>
void find_grids_of_samples(const Plan& p, const T* x, const Grids& grids, int threads) {
    constexpr int64_t part = 1 << 14;
    const int64_t values = p.channels * p.pixels(), parts = (values + part - 1) / part;
    for (int64_t b = 0; b < p.samples; b++) {
        int32_t hi = 0;
        uint32_t lo = NEGATIVE;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : hi, lo) if (threads > 1)
#endif
        for (int64_t i = 0; i < parts; i++) {
            const Range range = range_of(x + b * values + i * part, least(part, values - i * part));
            const int32_t highest = range.highest();
            const uint32_t lowest = range.lowest();
            hi = highest > hi ? highest : hi;
            lo = lowest > lo ? lowest : lo;
        }
        grids.set(b, hi, lo);
    }
}

template <class T>
void quantize_samples(const Plan& p, const T* x, uint8_t* codes, const Grids& grids, int threads) {
    find_grids_of_samples(p, x, grids, threads);
    const int64_t pitch = p.pitch(), pixels = p.pixels(), lines = p.size[0] * p.size[1];
    if (p.padding[0] || p.padding[1] || p.padding[2])
        for (int64_t b = 0; b < p.samples; b++)
            std::memset(codes + b * p.sample_bytes(), grids.zero[b], p.sample_bytes());
    const bool whole = !p.padding[2] && !p.padding[1];  // lines are adjacent: treat a plane as one line
    const int64_t width = whole ? p.size[1] * p.size[2] : p.size[2], count = whole ? p.size[0] : lines;
    PARALLEL_FOR(threads)
    for (int64_t i = 0; i < p.samples * count; i++) {
        const int64_t b = i / count, line = i % count;
        const int64_t d = whole ? line : line / p.size[1], h = whole ? 0 : line % p.size[1];
        uint8_t* to = codes + b * p.sample_bytes() +
                      (((d + p.padding[0]) * p.padded(1) + h + p.padding[1]) * p.padded(2) + p.padding[2]) * pitch;
        const int64_t first = line * width;
        const Quantizer quantizer = Quantizer::of_all(grids.from(b));
        if (p.planar)
            turn_pixels(x + b * p.channels * pixels + first, pixels, p.channels, width,
                        [&](int64_t) -> const Quantizer& { return quantizer; }, to, pitch);
        else
            for (int64_t w = 0; w < width; w++)
                quantize_row(x + (b * pixels + first + w) * p.channels, p.channels, pitch, quantizer, to + w * pitch);
    }
}

template <class T>
void quantize(const Plan& p, const T* x, uint8_t* codes, const Grids& grids, int threads) {
    if (!p.by_position)
        quantize_samples(p, x, codes, grids, threads);
    else if (p.planar)
        quantize_pixels(p, x, codes, grids, threads);
    else
        quantize_rows(p, x, codes, grids, threads);
}

}  // namespace

#endif
