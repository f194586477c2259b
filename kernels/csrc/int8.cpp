// INT8 compute (kernels/int8_compute.py) with the VNNI instructions of AVX-512.
//
//     y = (sum_k (x_q + 128) w_q - 128 sum_k w_q) (s_x s_w) + b
//
// Inputs are quantized into bytes with zero point 128, channels fastest, the borders of a convolution filled with the
// code of zero; so the second sum is the same for every output position. A linear layer is a convolution of one tap over
// a line of rows. Tiles of 6 positions by up to 64 channels stay in registers for the whole sum.

#include "floats.h"

#if defined(WIDE_VECTORS) && defined(__AVX512VNNI__)

namespace {

constexpr int64_t TILE = 6, STRIP = 48, PANEL = 64;
constexpr int64_t CACHE = 1 << 19;  // bytes of weights
constexpr int ZERO = 128;

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Quantization

template <class T>
int32_t largest_bits(const T* x, int64_t length) {  // of |x|, as an integer: NaN > inf > every number
    const __m512i sign = _mm512_set1_epi32(0x7fffffff);
    __m512i top[4] = {};
    int64_t i = 0;
    for (; i + 64 <= length; i += 64)
        for (int j = 0; j < 4; j++) {
            __m512i bits = _mm512_castps_si512(load16(x + i + 16 * j, 0xffff));
            top[j] = _mm512_max_epi32(top[j], _mm512_and_si512(bits, sign));
        }
    for (; i < length; i += 16) {
        __m512i bits = _mm512_castps_si512(load16(x + i, first_lanes(length - i)));
        top[0] = _mm512_max_epi32(top[0], _mm512_and_si512(bits, sign));
    }
    return _mm512_reduce_max_epi32(_mm512_max_epi32(_mm512_max_epi32(top[0], top[1]), _mm512_max_epi32(top[2], top[3])));
}

inline float scale_of(int32_t bits) {  // NaN where the largest value is not finite
    if (bits >= 0x7f800000) return as_float(0x7fc00000);
    const float scale = as_float(uint32_t(bits)) / 127.0f;
    return scale == 0 ? 1.0f : scale;
}

// x / scale, to nearest even, in [-127, 127], plus 128. A product is faster than a division, and errs by less than 2^-14
// here: only where it lies that close to a tie is it divided.
struct Quantizer {
    __m512 scale, inverse;
    bool simple;

    explicit Quantizer(float s)
        : scale(_mm512_set1_ps(s)), inverse(_mm512_set1_ps(1 / s)), simple(s > 1e-30f && s < 1e30f) {}

    __m512i operator()(__m512 x) const {
        __m512 code = _mm512_mul_ps(x, inverse);
        __m512 whole = _mm512_roundscale_ps(code, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        __m512 rest = _mm512_abs_ps(_mm512_sub_ps(code, whole));
        if (!simple || _mm512_cmp_ps_mask(rest, _mm512_set1_ps(0.5f - 0x1p-13f), _CMP_GE_OQ))
            whole = _mm512_roundscale_ps(_mm512_div_ps(x, scale), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        whole = _mm512_max_ps(_mm512_min_ps(whole, _mm512_set1_ps(127)), _mm512_set1_ps(-127));  // NaN becomes 127
        return _mm512_add_epi32(_mm512_cvtps_epi32(whole), _mm512_set1_epi32(ZERO));
    }
};

template <class T>
void quantize_row(const T* x, int64_t length, int64_t padded, const Quantizer& quantizer, uint8_t* to) {
    for (int64_t i = 0; i < padded; i += 16) {
        const __mmask16 lanes = first_lanes(length > i ? length - i : 0);
        __m128i codes = _mm512_cvtepi32_epi8(quantizer(load16(x + i, lanes)));
        _mm_mask_storeu_epi8(to + i, first_lanes(padded - i), codes);
    }
}

// 16 pixels of 16 channels, channels `stride` apart -> a run of 16 bytes for each pixel
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

// The product

using Tile = void (*)(const uint8_t* const*, const int8_t*, const int64_t*, int64_t, int64_t, int32_t*);

template <int R, int V>
void tile(const uint8_t* const* positions, const int8_t* weight, const int64_t* runs, int64_t run_count, int64_t run,
          int32_t* sums) {
    __m512i total[R][V];
    const uint8_t* x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        x[r] = positions[r];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) total[r][v] = _mm512_setzero_si512();
    }
    for (int64_t i = 0; i < run_count; i++) {
        const int64_t from = runs[i];
        for (int64_t k = from; k < from + run; k += 4) {
            __m512i w[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) w[v] = _mm512_loadu_si512(weight + 64 * v);
            weight += 64 * V;
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                int32_t four;
                std::memcpy(&four, x[r] + k, 4);
                const __m512i codes = _mm512_set1_epi32(four);
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) total[r][v] = _mm512_dpbusd_epi32(total[r][v], codes, w[v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) _mm512_storeu_si512(sums + r * PANEL + 16 * v, total[r][v]);
}

#define TILES_OF(V) {nullptr, tile<1, V>, tile<2, V>, tile<3, V>, tile<4, V>, tile<5, V>, tile<6, V>}
const Tile TILES[][TILE + 1] = {{}, TILES_OF(1), TILES_OF(2), TILES_OF(3), TILES_OF(4)};

// Output channels in panels of 1 to 4 vectors, as even as can be.
struct Panels {
    int64_t vectors, count;
    explicit Panels(int64_t out) : vectors((out + 15) / 16), count((vectors + 3) / 4) {}
    int64_t first(int64_t panel) const {
        const int64_t width = vectors / count, wider = vectors % count;
        return panel * width + least(panel, wider);
    }
};

struct Epilogue {
    const float* scale;      // of the input: one a sample, or one a position
    const float* out_scale;  // of the weight, padded to whole vectors
    const int32_t* offsets;  // 128 sum_k w_q, likewise
    int64_t by_position, out, positions, channels_last;
};

// sums[position][channel] -> values, in place or, where the result has channels last, written to y.
template <int V, class T>
void scale(int32_t* sums, const float* scales, int64_t step, const Epilogue& e, int64_t count, int64_t channel,
           const T* bias, T* y) {
    __m512i offset[V];
    __m512 out_scale[V], added[V];
    __mmask16 lanes[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
        const int64_t n = channel + 16 * v;
        lanes[v] = first_lanes(e.out - n);
        offset[v] = _mm512_loadu_si512(e.offsets + n);
        out_scale[v] = _mm512_loadu_ps(e.out_scale + n);
        added[v] = bias ? load16(bias + n, lanes[v]) : _mm512_set1_ps(-0.0f);  // which changes no sum
    }
    for (int64_t p = 0; p < count; p++) {
        const __m512 own = _mm512_set1_ps(scales[p * step]);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            const __m512i sum = _mm512_sub_epi32(_mm512_loadu_si512(sums + p * PANEL + 16 * v), offset[v]);
            const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(own, out_scale[v]));
            if (e.channels_last)
                store16(y + p * e.out + 16 * v, _mm512_add_ps(value, added[v]), lanes[v]);
            else
                _mm512_storeu_ps(sums + p * PANEL + 16 * v, _mm512_add_ps(value, added[v]));
        }
    }
}

template <class T>
void turn(const float* values, int64_t count, int64_t channels, int64_t stride, T* y) {
    for (int64_t c = 0; c < channels; c += 4) {
        alignas(64) float turned[4][STRIP];
        for (int64_t p = 0; p < count; p += 4) {
            __m128 r0 = _mm_loadu_ps(values + p * PANEL + c), r1 = _mm_loadu_ps(values + (p + 1) * PANEL + c);
            __m128 r2 = _mm_loadu_ps(values + (p + 2) * PANEL + c), r3 = _mm_loadu_ps(values + (p + 3) * PANEL + c);
            _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
            _mm_store_ps(turned[0] + p, r0);
            _mm_store_ps(turned[1] + p, r1);
            _mm_store_ps(turned[2] + p, r2);
            _mm_store_ps(turned[3] + p, r3);
        }
        for (int64_t i = 0; i < least(4, channels - c); i++) narrow_row(turned[i], count, y + (c + i) * stride);
    }
}

// One strip of one sample and one panel.
template <class T>
void finish(int32_t* sums, const Epilogue& e, int64_t sample, int64_t at, int64_t count, int64_t channel,
            int64_t vectors, const T* bias, T* y) {
    const int64_t position = sample * e.positions + at;
    const float* scales = e.scale + (e.by_position ? position : sample);
    T* to = e.channels_last ? y + position * e.out + channel : y + (sample * e.out + channel) * e.positions + at;
    if (vectors == 1) scale<1>(sums, scales, e.by_position, e, count, channel, bias, to);
    if (vectors == 2) scale<2>(sums, scales, e.by_position, e, count, channel, bias, to);
    if (vectors == 3) scale<3>(sums, scales, e.by_position, e, count, channel, bias, to);
    if (vectors == 4) scale<4>(sums, scales, e.by_position, e, count, channel, bias, to);
    if (!e.channels_last)
        turn(reinterpret_cast<float*>(sums), count, least(e.out - channel, 16 * vectors), e.positions, to);
}

// How a convolution reads its padded input and writes its output; 3 dimensions, absent ones of size 1.
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
};

template <class T>
void quantize_rows(const Plan& p, const T* x, uint8_t* codes, float* scales, int threads) {
    const int64_t rows = p.samples * p.pixels(), pitch = p.pitch();
    PARALLEL_FOR(threads)
    for (int64_t m = 0; m < rows; m++) {
        const T* row = x + m * p.channels;
        scales[m] = scale_of(largest_bits(row, p.channels));
        quantize_row(row, p.channels, pitch, Quantizer(scales[m]), codes + m * pitch);
    }
}

template <class T>
void find_scales(const Plan& p, const T* x, float* scales, int threads) {
    constexpr int64_t piece = 1 << 14;
    const int64_t values = p.channels * p.pixels(), pieces = (values + piece - 1) / piece;
    for (int64_t b = 0; b < p.samples; b++) {
        int32_t top = 0;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : top) if (threads > 1)
#endif
        for (int64_t i = 0; i < pieces; i++) {
            const int32_t found = largest_bits(x + b * values + i * piece, least(piece, values - i * piece));
            top = found > top ? found : top;
        }
        scales[b] = scale_of(top);
    }
}

template <class T>
void quantize_samples(const Plan& p, const T* x, uint8_t* codes, float* scales, int threads) {
    find_scales(p, x, scales, threads);
    const int64_t pitch = p.pitch(), pixels = p.pixels(), lines = p.size[0] * p.size[1];
    if (p.padding[0] || p.padding[1] || p.padding[2]) std::memset(codes, ZERO, p.samples * p.sample_bytes());
    const bool whole = !p.padding[2] && !p.padding[1];  // lines follow each other: take all of a plane as one
    const int64_t width = whole ? p.size[1] * p.size[2] : p.size[2], count = whole ? p.size[0] : lines;
    PARALLEL_FOR(threads)
    for (int64_t i = 0; i < p.samples * count; i++) {
        const int64_t b = i / count, line = i % count;
        const int64_t d = whole ? line : line / p.size[1], h = whole ? 0 : line % p.size[1];
        uint8_t* to = codes + b * p.sample_bytes() +
                      (((d + p.padding[0]) * p.padded(1) + h + p.padding[1]) * p.padded(2) + p.padding[2]) * pitch;
        const int64_t first = line * width;
        const Quantizer quantizer(scales[b]);
        if (!p.planar) {
            for (int64_t w = 0; w < width; w++)
                quantize_row(x + (b * pixels + first + w) * p.channels, p.channels, pitch, quantizer, to + w * pitch);
            continue;
        }
        constexpr int64_t piece = 256;  // pixels whose codes stay in the cache
        for (int64_t at = 0; at < width; at += piece)
            for (int64_t c = 0; c < p.channels; c += 16)
                for (int64_t w = at; w < least(at + piece, width); w += 16)
                    turn_block(x + (b * p.channels + c) * pixels + first + w, pixels, least(16, p.channels - c),
                               least(16, width - w), quantizer, to + w * pitch + c, pitch);
    }
}

template <class T>
void multiply(const Plan& p, const T* x, const int8_t* weight, const float* out_scale, const int32_t* offsets,
              const T* bias, T* y, uint8_t* codes, float* scales, int threads) {
    if (p.by_position)
        quantize_rows(p, x, codes, scales, threads);
    else
        quantize_samples(p, x, codes, scales, threads);

    const int64_t pitch = p.pitch(), taps = p.kernel[0] * p.kernel[1] * p.kernel[2];
    const bool joined = p.dilation[2] == 1;  // the taps of a line lie side by side
    const int64_t across = joined ? 1 : p.kernel[2], run = joined ? pitch * p.kernel[2] : pitch;
    const int64_t run_count = p.kernel[0] * p.kernel[1] * across;
    int64_t few[64];
    int64_t* runs = run_count <= 64 ? few : new int64_t[run_count];
    for (int64_t d = 0, i = 0; d < p.kernel[0]; d++)
        for (int64_t h = 0; h < p.kernel[1]; h++)
            for (int64_t w = 0; w < across; w++, i++)
                runs[i] = ((d * p.dilation[0] * p.padded(1) + h * p.dilation[1]) * p.padded(2) + w * p.dilation[2]) * pitch;

    const Panels panels(p.out);
    const int64_t positions = p.positions(), strips = (positions + STRIP - 1) / STRIP;
    const int64_t high = p.steps(1), wide = p.steps(2);
    const Epilogue epilogue{scales, out_scale, offsets, p.by_position, p.out, positions, p.channels_last};
    // As many panels as the second cache holds are multiplied with a strip before the next one.
    const int64_t held = CACHE / (PANEL * pitch * taps), group = held < 1 ? 1 : least(held, panels.count);
    const int64_t all = p.samples * strips;
    PARALLEL_FOR(threads)
    for (int64_t i = 0; i < panels.count * all; i++) {
        const int64_t first = i / (group * all) * group, in_group = least(group, panels.count - first);
        const int64_t rest = i - first * all, panel = first + rest % in_group;
        const int64_t sample = rest / in_group / strips, at = rest / in_group % strips * STRIP;
        const int64_t count = least(STRIP, positions - at);
        const int64_t vector = panels.first(panel), vectors = panels.first(panel + 1) - vector;
        const uint8_t* from[STRIP];
        int64_t w = at % wide, h = at / wide % high, d = at / (wide * high);
        for (int64_t j = 0; j < count; j++) {
            from[j] = codes + sample * p.sample_bytes() +
                      ((d * p.stride[0] * p.padded(1) + h * p.stride[1]) * p.padded(2) + w * p.stride[2]) * pitch;
            if (++w == wide) w = 0, h++;
            if (h == high) h = 0, d++;
        }
        alignas(64) int32_t sums[STRIP * PANEL];
        const int8_t* packed = weight + vector * 16 * pitch * taps;
        for (int64_t j = 0; j < count; j += TILE)
            TILES[vectors][least(TILE, count - j)](from + j, packed, runs, run_count, run, sums + j * PANEL);
        finish(sums, epilogue, sample, at, count, 16 * vector, vectors, bias, y);
    }
    if (runs != few) delete[] runs;
}

}  // namespace

extern "C" {

int bitpolicy_has_int8() { return 1; }

// w (out, channels, taps) -> panels of [tap][channel / 4][output channel][channel % 4], and 128 sum_k w; padded by zeros.
void bitpolicy_int8_pack(const int8_t* w, int64_t out, int64_t channels, int64_t taps, int8_t* packed,
                         int32_t* offsets) {
    const int64_t pitch = round_up(channels, 4);
    const Panels panels(out);
    std::memset(packed, 0, panels.vectors * 16 * pitch * taps);
    for (int64_t panel = 0; panel < panels.count; panel++) {
        const int64_t first = 16 * panels.first(panel), width = 16 * panels.first(panel + 1) - first;
        int8_t* to = packed + first * pitch * taps;
        for (int64_t n = first; n < first + width; n++) {
            int32_t sum = 0;
            for (int64_t t = 0; n < out && t < taps; t++)
                for (int64_t c = 0; c < channels; c++) {
                    const int8_t code = w[(n * channels + c) * taps + t];
                    sum += code;
                    to[((t * pitch + c) / 4 * width + n - first) * 4 + c % 4] = code;
                }
            offsets[n] = ZERO * sum;
        }
    }
}

// codes: room for samples * sample_bytes(); scales: room for one a sample, or one a row.
void bitpolicy_int8_multiply(const int64_t* plan, const void* x, const int8_t* weight, const float* out_scale,
                             const int32_t* offsets, const void* bias, void* y, uint8_t* codes, float* scales,
                             int dtype, int threads) {
    Plan p;
    std::memcpy(&p, plan, sizeof p);
    if (dtype == FLOAT)
        multiply(p, static_cast<const float*>(x), weight, out_scale, offsets, static_cast<const float*>(bias),
                 static_cast<float*>(y), codes, scales, threads);
    if (dtype == HALF)
        multiply(p, static_cast<const Half*>(x), weight, out_scale, offsets, static_cast<const Half*>(bias),
                 static_cast<Half*>(y), codes, scales, threads);
    if (dtype == BFLOAT)
        multiply(p, static_cast<const Bfloat*>(x), weight, out_scale, offsets, static_cast<const Bfloat*>(bias),
                 static_cast<Bfloat*>(y), codes, scales, threads);
}
}

#else

extern "C" {
int bitpolicy_has_int8() { return 0; }
}

#endif
