// Few rows times quantised weights of the experts that they chose, weights as they are loaded. `cpu_few.py` builds and calls it.
// A row of a weight is read once for each row of x and never written out: its values become float32 in registers, a lane each, get
// their group's scale as sums of the group, and are added up across lanes at the end. Threads share the rows out.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t LANES = 16;
enum Kind { INT8, FP8, INT4, MXFP4 };
// Of GCC and Clang, on whatever vectors the CPU has.
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

template <typename To, typename From>
inline To bits_as(const From& from) {
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <typename Type>
inline Type loaded(const void* from) {
    Type to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

template <int KIND>
inline Floats values(const Bytes& codes) {
    const Words code = __builtin_convertvector(codes, Words);
    if constexpr (KIND == INT8) return __builtin_convertvector(code << 24 >> 24, Floats);
    if constexpr (KIND == INT4) return __builtin_convertvector(code - 8, Floats);
    // Small floats get the exponent of a float32. What has none is a mantissa alone: 1 + mantissa, less 1, a step further up.
    constexpr int MANTISSA = KIND == FP8 ? 3 : 1, BIAS = KIND == FP8 ? 7 : 1, SIGN = KIND == FP8 ? 0x80 : 8;
    constexpr float LEAST = KIND == FP8 ? 0.015625f : 1.0f;
    const Words bits = (code & (SIGN - 1)) << (23 - MANTISSA);
    const Floats normal = bits_as<Floats>(bits + ((127 - BIAS) << 23));
    const Floats least = bits_as<Floats>(bits + ((128 - BIAS) << 23)) - LEAST;
    const Floats size = bits < (1 << 23) ? least : normal;
    return bits_as<Floats>(bits_as<Words>(size) | ((code & SIGN) << (KIND == FP8 ? 24 : 28)));
}

// total += scale * (qweight of `count` columns times x). 4 bits: of 32 columns the first 16 are the low halves of 16 bytes.
template <int KIND>
inline void add_group(const uint8_t* qweight, const float* x, int64_t count, float scale, Floats& total) {
    Floats first = {}, second = {};
    int64_t k = 0;
    for (; k + 2 * LANES <= count; k += 2 * LANES) {
        Bytes low, high;
        if constexpr (KIND >= INT4) {
            const Bytes both = loaded<Bytes>(qweight + k / 2);
            low = both & 15, high = both >> 4;
        } else {
            low = loaded<Bytes>(qweight + k), high = loaded<Bytes>(qweight + k + LANES);
        }
        first += values<KIND>(low) * loaded<Floats>(x + k);
        second += values<KIND>(high) * loaded<Floats>(x + k + LANES);
    }
    for (; k < count; k++) {  // of 8 bits: 4-bit values come by 32
        const Bytes one = {qweight[k]};
        first[0] += values<KIND>(one)[0] * x[k];
    }
    total += scale * (first + second);
}

struct Weight {  // [E, N, K]
    const uint8_t *qweight, *codes;  // codes: of E8M0, instead of scale
    const float *scale, *zero;
    int64_t N, K, group;
};

template <int KIND>
float product(const Weight& weight, int64_t row, const float* x, const float* sums) {
    const int64_t groups = (weight.K + weight.group - 1) / weight.group;
    const uint8_t* qweight = weight.qweight + row * (KIND >= INT4 ? weight.K / 2 : weight.K);
    Floats total = {};
    float out = 0;
    for (int64_t g = 0; g < groups; g++) {
        const int64_t begin = g * weight.group, count = std::min(weight.group, weight.K - begin);
        const int64_t at = row * groups + g;
        float scale = KIND == MXFP4 ? 0 : weight.scale[at];
        if (KIND == MXFP4) scale = bits_as<float>(weight.codes[at] ? weight.codes[at] << 23 : 1 << 22);
        add_group<KIND>(qweight + (KIND >= INT4 ? begin / 2 : begin), x + begin, count, scale, total);
        if (weight.zero) out += weight.zero[at] * sums[g];
    }
    for (int64_t i = 0; i < LANES; i++) out += total[i];
    return out;
}

template <int KIND>
void products(const Weight& weight, const int64_t* parts, int64_t count, const float* x, const float* sums, float* out) {
    const int64_t groups = (weight.K + weight.group - 1) / weight.group;
#pragma omp parallel for schedule(static)
    for (int64_t task = 0; task < count * weight.N; task++) {
        const int64_t *part = parts + 3 * (task / weight.N), n = task % weight.N;
        for (int64_t row = part[1]; row < part[2]; row++)
            out[row * weight.N + n] =
                product<KIND>(weight, part[0] * weight.N + n, x + row * weight.K, sums + row * groups);
    }
}

}  // namespace

// x [rows, K] -> out [rows, N] of rows that a part (expert, first row, behind the last) names. kind: as above.
extern "C" void kernel(const float* x, const int64_t* parts, const uint8_t* qweight, const uint8_t* codes, const float* scale,
                       const float* zero, float* out, int64_t count, int64_t rows, int64_t N, int64_t K, int64_t group,
                       int64_t kind, int64_t has_zero) {
    const Weight weight{qweight, codes, scale, has_zero ? zero : nullptr, N, K, group};
    const int64_t groups = (K + group - 1) / group;
    std::vector<float> sums(rows * groups);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t k = 0; k < K; k++) sums[row * groups + k / group] += x[row * K + k];
    const auto run = kind == INT8 ? products<INT8> : kind == FP8 ? products<FP8> : kind == INT4 ? products<INT4> : products<MXFP4>;
    run(weight, parts, count, x, sums.data(), out);
}
