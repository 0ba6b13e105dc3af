// One row of bfloat16 [K] times 4-bit codes as PyTorch packs them for AVX-512 -> [N]. `cpu_int4.py` builds and calls it.
// Of each column and block of 64 rows 32 bytes hold the first 32 rows in their low halves: a row is a lane of a vector, and no
// sum goes across one. Sums are taken in float32, a group's before its scale and shift.
#include <immintrin.h>

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

}  // namespace

// x [K], pairs [K / group, N, 2] (scale, shift) and out [N] bfloat16; packed [N / 64, K, 32].
extern "C" void kernel(const uint16_t* x, const uint8_t* packed, const uint16_t* pairs, uint16_t* out, int64_t N, int64_t K,
                       int64_t group) {
    const int64_t groups = K / group;
    std::vector<float> row(K), sums(groups, 0.0f);
    for (int64_t k = 0; k < K; k++) row[k] = wide(x[k]);
    for (int64_t k = 0; k < K; k++) sums[k / group] += row[k];
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < N / (2 * LANES); block++) {
        const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        const uint8_t* codes = packed + block * K * LANES;
        __m512 total[4] = {};  // rows 0, 16, 32 and 48 on
        for (int64_t g = 0; g < groups; g++) {
            __m512 sum[4] = {};
            for (int64_t k = g * group; k < (g + 1) * group; k++, codes += LANES) {
                const __m512 column = _mm512_set1_ps(row[k]);
                const __m512i first = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes));
                const __m512i second = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + 16)));
                // A look-up takes the low four bits of each index.
                sum[0] = _mm512_fmadd_ps(column, _mm512_permutexvar_ps(first, values), sum[0]);
                sum[1] = _mm512_fmadd_ps(column, _mm512_permutexvar_ps(second, values), sum[1]);
                sum[2] = _mm512_fmadd_ps(column, _mm512_permutexvar_ps(_mm512_srli_epi32(first, 4), values), sum[2]);
                sum[3] = _mm512_fmadd_ps(column, _mm512_permutexvar_ps(_mm512_srli_epi32(second, 4), values), sum[3]);
            }
            const __m512 columns = _mm512_set1_ps(sums[g]);
            for (int i = 0; i < 4; i++) {  // a scale and its shift are the low and the high half of a word
                const __m512i word = _mm512_loadu_si512(pairs + (g * N + block * 2 * LANES + i * 16) * 2);
                const __m512 shift = _mm512_castsi512_ps(_mm512_and_si512(word, _mm512_set1_epi32(0xffff0000)));
                total[i] = _mm512_fmadd_ps(sum[i], _mm512_castsi512_ps(_mm512_slli_epi32(word, 16)), total[i]);
                total[i] = _mm512_fmadd_ps(columns, shift, total[i]);
            }
        }
        float rows[2 * LANES];
        for (int i = 0; i < 4; i++) _mm512_storeu_ps(rows + 16 * i, total[i]);
        for (int64_t i = 0; i < 2 * LANES; i++) out[block * 2 * LANES + i] = narrow(rows[i]);
    }
}
