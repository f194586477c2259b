// INT8 activation quantization (kernels/compute/int8.py) with the VNNI instructions of AVX-512.
//
//     y = (sum_k x_q w_q - z sum_k w_q) (s_x s_w) + b
//
// int8_input.h quantizes the inputs to bytes and fills a convolution's padding with the code of zero, so the second sum is the
// same for every output position. A linear layer is a convolution of one tap over a line of rows. Tiles of 6 positions by up
// to 64 channels stay in registers for the whole sum.

#include "int8_input.h"

#if defined(HAS_INT8)

namespace {

constexpr int64_t TILE = 6, STRIP = 48, PANEL = 64;
constexpr int64_t CACHE = 1 << 19;  // bytes of weights

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

// Divides output channels into panels of 1 to 4 vectors, as even as possible.
struct Panels {
    int64_t vectors, count;
    explicit Panels(int64_t out) : vectors((out + 15) / 16), count((vectors + 3) / 4) {}
    int64_t first(int64_t panel) const {
        const int64_t width = vectors / count, wider = vectors % count;
        return panel * width + least(panel, wider);
    }
};

struct Epilogue {
    Grids grids;
    const float* out_scale;  // of the weight, padded to whole vectors
    const int32_t* offsets;  // sum_k w_q, likewise
    int64_t by_position, out, positions, channels_last;
};

// Turns sums[position][channel] into values, in place or, if the result is channels last, in y.
template <int V, class T>
void scale(int32_t* sums, const Grids& grids, int64_t step, const Epilogue& e, int64_t count, int64_t channel,
           const T* bias, T* y) {
    __m512i offset[V], excess[V];
    __m512 out_scale[V], added[V];
    __mmask16 lanes[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
        const int64_t n = channel + 16 * v;
        lanes[v] = first_lanes(e.out - n);
        offset[v] = _mm512_loadu_si512(e.offsets + n);
        out_scale[v] = _mm512_loadu_ps(e.out_scale + n);
        added[v] = bias ? load16(bias + n, lanes[v]) : _mm512_set1_ps(-0.0f);  // -0 changes no sum
    }
    for (int64_t p = 0; p < count; p++) {
        const __m512 own = _mm512_set1_ps(grids.scale[p * step]);
        const __m512i zero = _mm512_set1_epi32(grids.zero[p * step]);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            if (step || !p) excess[v] = _mm512_mullo_epi32(zero, offset[v]);
            const __m512i sum = _mm512_sub_epi32(_mm512_loadu_si512(sums + p * PANEL + 16 * v), excess[v]);
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
    const Grids grids = e.grids.from(e.by_position ? position : sample);
    T* to = e.channels_last ? y + position * e.out + channel : y + (sample * e.out + channel) * e.positions + at;
    if (vectors == 1) scale<1>(sums, grids, e.by_position, e, count, channel, bias, to);
    if (vectors == 2) scale<2>(sums, grids, e.by_position, e, count, channel, bias, to);
    if (vectors == 3) scale<3>(sums, grids, e.by_position, e, count, channel, bias, to);
    if (vectors == 4) scale<4>(sums, grids, e.by_position, e, count, channel, bias, to);
    if (!e.channels_last)
        turn(reinterpret_cast<float*>(sums), count, least(e.out - channel, 16 * vectors), e.positions, to);
}

template <class T>
void multiply(const Plan& p, const T* x, const int8_t* weight, const float* out_scale, const int32_t* offsets,
              const T* bias, T* y, uint8_t* codes, float* scales, int threads) {
    const Grids grids{scales, reinterpret_cast<int32_t*>(scales) + p.grids()};
    quantize(p, x, codes, grids, threads);

    const int64_t pitch = p.pitch(), taps = p.kernel[0] * p.kernel[1] * p.kernel[2];
    const bool joined = p.dilation[2] == 1;  // the taps of a line are adjacent
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
    const Epilogue epilogue{grids, out_scale, offsets, p.by_position, p.out, positions, p.channels_last};
    // As many panels as fit the L2 cache are multiplied with a strip before the next strip.
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

// w (out, channels, taps) -> panels of [tap][channel / 4][output channel][channel % 4], and sum_k w; padded with zeros.
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
            offsets[n] = sum;
        }
    }
}

// codes: room for samples * sample_bytes(); scales: room for grids() scales and as many zero points.
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
