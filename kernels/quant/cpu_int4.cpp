// One row of bfloat16 times 4-bit qweight as PyTorch packs them for AVX-512, and up to four such products in a row with what a
// decoder layer has between them. `cpu_int4.py` builds and calls it.
// Of each column and block of 64 rows 32 bytes hold the first 32 rows in their low halves: a row is a lane of a vector, and no
// sum goes across one. Sums are taken in float32, a group's before its scale and zero. The two halves of a block's columns are
// tasks of their own, because a layer has odd numbers of blocks; what stands between products every thread computes for itself.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t LANES = 32;

inline float wide(uint16_t bfloat16) {
    const uint32_t bits = uint32_t(bfloat16) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline uint16_t narrow(float x) {  // to nearest even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

inline float rounded(float x) { return wide(narrow(x)); }

// e ** x to 2e-7 of it: 2 ** n times a polynomial (Taylor's) of what is left.
inline float exp_of(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    const int n = int(x * 1.442695041f + (x < 0 ? -0.5f : 0.5f));
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const float p = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f))))));
    const int32_t bits = (n + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

// 64 rows of one group: qweight [group, 32] times row [group] -> sum, rows 0, 16, 32 and 48 on. Values of row are bfloat16's.
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
inline void add_group(const uint8_t* qweight, const uint16_t* row, int64_t group, __m512 sum[4]) {
    // -8 .. 7 in bfloat16, twice: a look-up takes the low five bits of each index, of which the fifth is another value's.
    alignas(64) static const uint16_t values[32] = {
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
        0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
        0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    const __m512i table = _mm512_load_si512(values);
    // Bytes r and 32 + r, a row's qweight of two columns, go to the words of lane r; what else is in a word does not matter.
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i low = _mm512_add_epi32(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(LANES)), 16));
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(0x00100010));
    for (int64_t k = 0; k < group; k += 2, qweight += 2 * LANES) {
        int32_t pair;
        std::memcpy(&pair, row + k, 4);
        const __m512bh columns = (__m512bh)_mm512_set1_epi32(pair);
        const __m512i both = _mm512_loadu_si512(qweight);
        const __m512i first = _mm512_permutexvar_epi8(low, both), second = _mm512_permutexvar_epi8(high, both);
        const auto add = [&](__m512 to, __m512i index) {
            return _mm512_dpbf16_ps(to, (__m512bh)_mm512_permutexvar_epi16(index, table), columns);
        };
        sum[0] = add(sum[0], first);
        sum[1] = add(sum[1], second);
        sum[2] = add(sum[2], _mm512_srli_epi16(first, 4));
        sum[3] = add(sum[3], _mm512_srli_epi16(second, 4));
    }
}
#else
inline void add_group(const uint8_t* qweight, const uint16_t* row, int64_t group, __m512 sum[4]) {
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    for (int64_t k = 0; k < group; k++, qweight += LANES) {
        const __m512 column = _mm512_set1_ps(wide(row[k]));
        const __m512i first = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)qweight));
        const __m512i second = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(qweight + 16)));
        // A look-up takes the low four bits of each index.
        sum[0] = _mm512_fmadd_ps(column, _mm512_permutexvar_ps(first, values), sum[0]);
        sum[1] = _mm512_fmadd_ps(column, _mm512_permutexvar_ps(second, values), sum[1]);
        sum[2] = _mm512_fmadd_ps(column, _mm512_permutexvar_ps(_mm512_srli_epi32(first, 4), values), sum[2]);
        sum[3] = _mm512_fmadd_ps(column, _mm512_permutexvar_ps(_mm512_srli_epi32(second, 4), values), sum[3]);
    }
}
#endif

// pairs [K / group, N, 2] (scale, zero), bias and norm bfloat16; packed [N / 64, K, 32].
struct Product {
    const uint8_t* packed;
    const uint16_t *pairs, *bias, *norm;
    int64_t N, K, group;

    // 64 rows over groups begin .. end - 1, before the bias.
    void block(const uint16_t* row, const float* sums, int64_t at, int64_t begin, int64_t end, float* out) const {
        const uint8_t* qweight = packed + (at * K + begin * group) * LANES;
        __m512 total[4] = {};  // rows 0, 16, 32 and 48 on
        for (int64_t g = begin; g < end; g++, qweight += group * LANES) {
            __m512 sum[4] = {};
            add_group(qweight, row + g * group, group, sum);
            const __m512 columns = _mm512_set1_ps(sums[g]);
            for (int i = 0; i < 4; i++) {  // a scale and its zero are the low and the high half of a word
                const __m512i word = _mm512_loadu_si512(pairs + (g * N + at * 2 * LANES + i * 16) * 2);
                const __m512 zero = _mm512_castsi512_ps(_mm512_and_si512(word, _mm512_set1_epi32(0xffff0000)));
                total[i] = _mm512_fmadd_ps(sum[i], _mm512_castsi512_ps(_mm512_slli_epi32(word, 16)), total[i]);
                total[i] = _mm512_fmadd_ps(columns, zero, total[i]);
            }
        }
        for (int i = 0; i < 4; i++) _mm512_storeu_ps(out + 16 * i, total[i]);
    }

    // halves [2, N] -> the product, rounded as bfloat16.
    void finish(const float* halves, float* out) const {
        for (int64_t n = 0; n < N; n++) out[n] = rounded(halves[n] + halves[N + n]);
        for (int64_t n = 0; bias && n < N; n++) out[n] = rounded(out[n] + wide(bias[n]));
    }
};

void gate(float* row, int64_t size) {  // silu(first half) * second half
    for (int64_t i = 0; i < size; i++) row[i] = rounded(row[i] / (1 + exp_of(-row[i])) * row[size + i]);
}

// total = rounded(total + row), row = norm of total, rounded before the weight and after
void add_norm(float* total, float* row, const uint16_t* norm, int64_t size, float eps) {
    float squares = 0;
    for (int64_t i = 0; i < size; i++) total[i] = rounded(total[i] + row[i]);
    for (int64_t i = 0; i < size; i++) squares += total[i] * total[i];
    const float scale = 1 / std::sqrt(squares / size + eps);
    for (int64_t i = 0; i < size; i++) row[i] = rounded(wide(norm[i]) * rounded(total[i] * scale));
}

}  // namespace

// x [K] -> out [H + N]: each second product takes the norm of the residual [H] plus the one before, and the new residual comes
// before the last product in out. One product alone: out [N]. `biased` and `gated`: bits of products that have a bias, or whose
// result is gated.
extern "C" void kernel(const uint16_t* x, const uint16_t* residual, const uint8_t* packed0, const uint16_t* pairs0,
                       const uint16_t* bias0, const uint8_t* packed1, const uint16_t* pairs1, const uint16_t* bias1,
                       const uint16_t* norm1, const uint8_t* packed2, const uint16_t* pairs2, const uint16_t* bias2,
                       const uint8_t* packed3, const uint16_t* pairs3, const uint16_t* bias3, const uint16_t* norm3,
                       uint16_t* out, int64_t count, int64_t biased, int64_t gated, int64_t K0, int64_t N0,
                       int64_t group0, int64_t K1, int64_t N1, int64_t group1, int64_t K2,
                       int64_t N2, int64_t group2, int64_t K3, int64_t N3, int64_t group3,
                       float eps1, float eps3) {
    Product products[] = {{packed0, pairs0, bias0, nullptr, N0, K0, group0},
                          {packed1, pairs1, bias1, norm1, N1, K1, group1},
                          {packed2, pairs2, bias2, nullptr, N2, K2, group2},
                          {packed3, pairs3, bias3, norm3, N3, K3, group3}};
    int64_t max_size = K0;
    for (int64_t i = 0; i < count; i++) {
        max_size = std::max({max_size, products[i].N, products[i].K});
        if (!(biased >> i & 1)) products[i].bias = nullptr;
    }
    const int64_t H = count > 1 ? N0 : 0;
    std::vector<float> scratch(4 * max_size);  // halves of a product's columns, and of the one before
#pragma omp parallel
    {
        std::vector<float> held(2 * max_size + H);
        std::vector<uint16_t> narrowed(max_size);
        float *row = held.data(), *sums = row + max_size, *total = sums + max_size;
        for (int64_t k = 0; k < K0; k++) row[k] = wide(x[k]);
        for (int64_t i = 0; i < H; i++) total[i] = wide(residual[i]);
        for (int64_t i = 0; i < count; i++) {
            const Product& product = products[i];
            if (i % 2) add_norm(total, row, product.norm, H, i == 1 ? eps1 : eps3);
            const int64_t groups = product.K / product.group;
            for (int64_t k = 0; k < product.K; k++) narrowed[k] = narrow(row[k]);
            for (int64_t g = 0; g < groups; g++) {
                float sum = 0;
                for (int64_t k = g * product.group; k < (g + 1) * product.group; k++) sum += row[k];
                sums[g] = sum;
            }
            float* halves = scratch.data() + i % 2 * 2 * max_size;
#pragma omp for schedule(static)
            for (int64_t task = 0; task < product.N / LANES; task++) {
                const int64_t at = task / 2, half = task % 2, middle = groups / 2;
                float* to = halves + half * product.N + at * 2 * LANES;
                product.block(narrowed.data(), sums, at, half ? middle : 0, half ? groups : middle, to);
            }
            product.finish(halves, row);
            if (gated >> i & 1) gate(row, product.N / 2);
        }
#pragma omp single nowait
        {
            const int64_t N = products[count - 1].N / (gated >> (count - 1) & 1 ? 2 : 1);
            for (int64_t i = 0; i < H; i++) out[i] = narrow(total[i]);
            for (int64_t i = 0; i < N; i++) out[H + i] = narrow(row[i]);
        }
    }
}
