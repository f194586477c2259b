// Linear layers with few rows, compute mode FLOAT: the weight is dequantized in registers, between its bytes and the sums.
//
//     y[r, n] = sum_k x[r, k] w[n, k] + b[n],    w = (code - zero) scale, or level[code] scale
//
// With one or two rows, nearly all time goes into reading the weight. Codes are a quarter or an eighth of its float size, and
// the weight is never written. Sums are float32, in sixteen parts added at the end, so no row's result depends on the others.

#include "lanes.h"

#include <vector>

namespace {

constexpr int64_t BLOCK = 2 * LANES;  // weights read at once; a group is a whole number of blocks, or a row

struct Layer {
    const uint8_t* codes;
    const void* scale;    // float32 for signed bytes, else float16
    const uint8_t* zero;  // null: 2^(bits-1)
    const float* levels;  // for nf4; null: affine
    int64_t bits, out, length, group;

    int64_t row_bytes() const { return bits == 4 ? (length + 1) / 2 : length; }
    int64_t groups() const { return (length + group - 1) / group; }
};

// Readers for the weights of one channel: `enter` each group, then `read` its blocks, two vectors each.

// int8: the channel's scale multiplies the finished sum.
struct Channel {
    static constexpr int shift = 0;  // log2 of codes per byte
    static constexpr bool paired = false;  // the second vector follows the first

    float scale;

    ALWAYS_INLINE void begin(const Layer& layer, int64_t n) { scale = static_cast<const float*>(layer.scale)[n]; }
    ALWAYS_INLINE void enter(int64_t) {}
    ALWAYS_INLINE float finish(float sum) const { return sum * scale; }

    ALWAYS_INLINE void read(const uint8_t* codes, Floats& first, Floats& second) const {
        first = to_floats(signed_bytes(codes)), second = to_floats(signed_bytes(codes + LANES));
    }
};

struct Groups {
    const Half* scales;
    const uint8_t* zeros;
    float middle;

    ALWAYS_INLINE void begin(const Layer& layer, int64_t n) {
        scales = static_cast<const Half*>(layer.scale) + n * layer.groups();
        zeros = layer.zero ? layer.zero + n * layer.groups() : nullptr;
        middle = layer.levels ? 0.0f : float(1 << (layer.bits - 1));
    }
    ALWAYS_INLINE Floats scale(int64_t group) const { return spread(scales[group]); }
    ALWAYS_INLINE Floats zero(int64_t group) const { return spread(zeros ? float(zeros[group]) : middle); }
    ALWAYS_INLINE float finish(float sum) const { return sum; }
};

struct GroupedBytes : Groups {
    static constexpr int shift = 0;
    static constexpr bool paired = false;

    Floats factor, middle_code;

    ALWAYS_INLINE void enter(int64_t group) { factor = scale(group), middle_code = zero(group); }

    ALWAYS_INLINE void read(const uint8_t* codes, Floats& first, Floats& second) const {
        first = (to_floats(bytes(codes)) - middle_code) * factor;
        second = (to_floats(bytes(codes + LANES)) - middle_code) * factor;
    }
};

// The 16 distinct weights of a group fill one vector, indexed by the low halves of the bytes, then by the high ones.
struct GroupedHalves : Groups {
    static constexpr int shift = 1;
    static constexpr bool paired = true;  // even weights, then odd ones

    Floats levels, weights;

    ALWAYS_INLINE void begin(const Layer& layer, int64_t n) {
        Groups::begin(layer, n);
        alignas(64) static constexpr float whole[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        levels = load(layer.levels ? layer.levels : whole);
    }
    ALWAYS_INLINE void enter(int64_t group) { weights = (levels - zero(group)) * scale(group); }

    ALWAYS_INLINE void read(const uint8_t* codes, Floats& first, Floats& second) const {
        const Words pairs = bytes(codes);
        first = chosen(pairs, weights), second = chosen(pairs >> 4, weights);
    }
};

// The input in float32: rows of whole blocks, padded with zeros, in the order in which weights are read.
struct Input {
    const float* values;
    int64_t rows, pitch;
};

template <class T>
Input arranged(const T* x, int64_t rows, int64_t length, bool paired, std::vector<float>& to) {
    const int64_t pitch = (length + BLOCK - 1) / BLOCK * BLOCK;
    to.assign((rows + 1) * pitch + LANES, 0);
    float* values = to.data() + (-uintptr_t(to.data()) / sizeof(float) & (LANES - 1));  // aligned to a cache line
    float* plain = values + rows * pitch;
    for (int64_t r = 0; r < rows; r++) {
        float* row = values + r * pitch;
        widen_row(x + r * length, length, paired ? plain : row);
        for (int64_t k = 0; paired && k < pitch; k += BLOCK)
            for (int64_t i = 0; i < LANES; i++) {
                row[k + i] = plain[k + 2 * i];
                row[k + LANES + i] = plain[k + 2 * i + 1];
            }
    }
    return {values, rows, pitch};
}

// R rows by N channels.
template <class Weights, int R, int N>
void tile(const Layer& layer, int64_t n, const float* x, int64_t pitch, float* sums) {
    Weights w[N];
    const uint8_t* codes[N];
    Floats parts[R][N];
    const int64_t bytes = layer.row_bytes();
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) {
        w[i].begin(layer, n + i);
        codes[i] = layer.codes + (n + i) * bytes;
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) parts[r][i] = Floats{};
    }
    const auto add_block = [&](const uint8_t* const* from, int64_t offset, int64_t k) __attribute__((always_inline)) {
        Floats first[N], second[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) w[i].read(from[i] + offset, first[i], second[i]);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const Floats one = load(x + r * pitch + k), other = load(x + r * pitch + k + LANES);
#pragma GCC unroll 8
            for (int i = 0; i < N; i++) add_product(one, first[i], parts[r][i]);
#pragma GCC unroll 8
            for (int i = 0; i < N; i++) add_product(other, second[i], parts[r][i]);
        }
    };
    for (int64_t k = 0, group = 0; k < layer.length; group++) {
        const int64_t end = k + layer.group < layer.length ? k + layer.group : layer.length;
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) w[i].enter(group);
        for (; k + BLOCK <= end; k += BLOCK) add_block(codes, k >> Weights::shift, k);
        if (k < end) {  // the end of a row, padded with zeros
            const int64_t at = k >> Weights::shift;
            uint8_t rest[N][BLOCK] = {};
            const uint8_t* from[N];
            for (int i = 0; i < N; i++) std::memcpy(rest[i], codes[i] + at, bytes - at), from[i] = rest[i];
            add_block(from, 0, k);
            k = end;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) sums[r * N + i] = w[i].finish(total(parts[r][i]));
}

template <class Weights, int R, int N, class T>
void rows_by_channels(const Layer& layer, const Input& x, int64_t row, int64_t n, const T* bias, T* y) {
    float sums[R * N];
    tile<Weights, R, N>(layer, n, x.values + row * x.pitch, x.pitch, sums);
    for (int r = 0; r < R; r++)
        for (int i = 0; i < N; i++)
            narrow(bias ? sums[r * N + i] + widen(bias[n + i]) : sums[r * N + i], y + (row + r) * layer.out + n + i);
}

// Rows [row, row + R) by channels [n, end).
template <class Weights, int R, class T>
void strip(const Layer& layer, const Input& x, int64_t row, int64_t n, int64_t end, const T* bias, T* y) {
    constexpr int N = R <= 2 ? 4 : 2;  // as many sums as fit the registers
    for (; n + N <= end; n += N) rows_by_channels<Weights, R, N>(layer, x, row, n, bias, y);
    for (; n < end; n++) rows_by_channels<Weights, R, 1>(layer, x, row, n, bias, y);
}

constexpr int64_t CHANNELS = 4;     // their codes stay in the L1 cache while all rows are multiplied with them
constexpr int64_t WORTH = 1 << 16;  // multiplications that justify waking another thread

template <class Weights, class T>
void multiply(const Layer& layer, const T* x, int64_t rows, const T* bias, T* y, int threads) {
    static thread_local std::vector<float> room;
    const Input input = arranged(x, rows, layer.length, Weights::paired, room);
    const int64_t worth = 1 + rows * layer.out * layer.length / WORTH, strips = (layer.out + CHANNELS - 1) / CHANNELS;
    threads = worth < threads ? int(worth) : threads;
    PARALLEL_FOR(threads)
    for (int64_t i = 0; i < strips; i++) {
        const int64_t n = i * CHANNELS, end = n + CHANNELS < layer.out ? n + CHANNELS : layer.out;
        int64_t row = 0;
        for (; row + 8 <= rows; row += 8) strip<Weights, 8>(layer, input, row, n, end, bias, y);
        if (rows & 4) strip<Weights, 4>(layer, input, row, n, end, bias, y), row += 4;
        if (rows & 2) strip<Weights, 2>(layer, input, row, n, end, bias, y), row += 2;
        if (rows & 1) strip<Weights, 1>(layer, input, row, n, end, bias, y);
    }
}

template <class T>
void multiply(const Layer& layer, const void* x, int64_t rows, const void* bias, void* y, int threads) {
    const T *from = static_cast<const T*>(x), *added = static_cast<const T*>(bias);
    T* to = static_cast<T*>(y);
    if (layer.bits == 0)
        multiply<Channel>(layer, from, rows, added, to, threads);
    else if (layer.bits == 8)
        multiply<GroupedBytes>(layer, from, rows, added, to, threads);
    else
        multiply<GroupedHalves>(layer, from, rows, added, to, threads);
}

}  // namespace

extern "C" {

// plan: bits (0: signed bytes with one float32 scale per channel), out, length, group (whole blocks, or the row), dtype. Codes,
// group scales and zero points are as in dequantize.cpp.
void bitpolicy_few_rows(const int64_t* plan, const uint8_t* codes, const void* scale, const uint8_t* zero,
                        const float* levels, const void* x, int64_t rows, const void* bias, void* y, int threads) {
    const Layer layer{codes, scale, zero, levels, plan[0], plan[1], plan[2], plan[3]};
    if (plan[4] == FLOAT) multiply<float>(layer, x, rows, bias, y, threads);
    if (plan[4] == HALF) multiply<Half>(layer, x, rows, bias, y, threads);
    if (plan[4] == BFLOAT) multiply<Bfloat>(layer, x, rows, bias, y, threads);
}
}
