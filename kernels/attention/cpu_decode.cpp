// Attention of decode rows on a CPU: softmax over the blocks of each row's sequence, in float32, built by `cpu_attention.py`.
// A task is one query head of one row, so what a row gives depends on no other row. Knows no dtype but float and bfloat16,
// no soft caps, no sinks.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t PARALLEL = 1000000;  // multiplications, 80 us of one thread: from here on waking a team pays

struct Bfloat16 {
    uint16_t bits;
};

inline float wide(float x) { return x; }
inline float wide(Bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, Bfloat16* out) {  // to nearest even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    out->bits = x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

// e ** x for x <= 0, to 2e-7 of it: 2 ** n times a polynomial (Taylor's) of what is left, at most half of ln 2.
inline float exp_of(float x) {
    x = std::max(x, -87.0f);
    const int n = int(x * 1.442695041f - 0.5f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const float p = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f))))));
    const int32_t bits = (n + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

// Tokens first .. last - 1 of a sequence, as they lie in blocks: `visit(j, at)` gets each token's place from the first on and
// the element of a cache at which its head begins.
template <typename Visit>
inline void walk(const int32_t* table, int64_t size, int64_t first, int64_t last, int64_t stride, int64_t offset, Visit visit) {
    int64_t block = first / size, at = first % size, j = 0;
    while (j < last - first) {
        int64_t element = (table[block] * size + at) * stride + offset;
        for (const int64_t end = std::min(j + size - at, last - first); j < end; j++, element += stride) visit(j, element);
        block++, at = 0;
    }
}

// One head of a query [D] over keys [.., D] and values [.., V]. SIZE, where not 0, is D and V: a head stays in registers.
template <typename T, int64_t SIZE>
void attend(const T* query, const T* keys, const T* values, T* out, const int32_t* table, int64_t block_size, int64_t groups,
            int64_t group, int64_t first, int64_t last, int64_t D, int64_t V, float scale, float* scratch) {
    if (SIZE) D = V = SIZE;
    float held[2 * (SIZE ? SIZE : 1)];
    float* const weights = scratch;
    float* const q = SIZE ? held : scratch + last;
    float* const acc = SIZE ? held + SIZE : q + D;
    for (int64_t d = 0; d < D; d++) q[d] = wide(query[d]) * scale;
    float max_ = -3e38f;
    walk(table, block_size, first, last, groups * D, group * D, [&](int64_t j, int64_t at) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < D; d++) sum += q[d] * wide(keys[at + d]);
        weights[j] = sum;
        max_ = std::max(max_, sum);
    });
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < last - first; j++) {
        weights[j] = exp_of(weights[j] - max_);
        total += weights[j];
    }
    for (int64_t d = 0; d < V; d++) acc[d] = 0;
    walk(table, block_size, first, last, groups * V, group * V, [&](int64_t j, int64_t at) {
        const float weight = weights[j];
#pragma omp simd
        for (int64_t d = 0; d < V; d++) acc[d] += weight * wide(values[at + d]);
    });
    for (int64_t d = 0; d < V; d++) narrow(total ? acc[d] / total : 0, out + d);  // nothing where there is no token
}

// Half-split rotation of one head [D], rounded once; D is even.
template <typename T>
inline void rotate(const T* x, const T* cos, const T* sin, T* out, int64_t D) {
    const int64_t half = D / 2;
#pragma omp simd
    for (int64_t d = 0; d < half; d++) {
        narrow(wide(x[d]) * wide(cos[d]) - wide(x[d + half]) * wide(sin[d]), out + d);
        narrow(wide(x[d + half]) * wide(cos[d + half]) + wide(x[d]) * wide(sin[d + half]), out + d + half);
    }
}

struct Heads {  // of a step: [rows, heads, size], elements of a head side by side
    const void* data;
    int64_t row_stride, head_stride;

    template <typename T>
    const T* at(int64_t row, int64_t head) const { return (const T*)data + row * row_stride + head * head_stride; }
};

template <typename T>
void run(Heads query, Heads key, Heads value, const T* cos, const T* sin, T* keys, T* values, const int32_t* slot_mapping, const int32_t* tables,
         const int32_t* lengths, T* out, int64_t rows, int64_t heads, int64_t groups, int64_t D, int64_t V, int64_t block_size, int64_t table_stride,
         int64_t window, int64_t chunk, bool write, float scale) {
    int64_t longest = 0;
    for (int64_t r = 0; r < rows; r++) {
        longest = std::max<int64_t>(longest, lengths[r]);
        for (int64_t g = 0; write && g < groups; g++) {
            T* const to = keys + (slot_mapping[r] * groups + g) * D;
            cos ? rotate(key.at<T>(r, g), cos + r * D, sin + r * D, to, D) : (void)std::memcpy(to, key.at<T>(r, g), D * sizeof(T));
            std::memcpy(values + (slot_mapping[r] * groups + g) * V, value.at<T>(r, g), V * sizeof(T));
        }
    }
    const auto one = D == V && D == 64 ? attend<T, 64> : D == V && D == 128 ? attend<T, 128> : attend<T, 0>;
#pragma omp parallel if (rows * heads * longest * (D + V) > PARALLEL)
    {
        std::vector<float> scratch(longest + D + V);
        std::vector<T> turned(D);
#pragma omp for
        for (int64_t task = 0; task < rows * heads; task++) {
            const int64_t r = task / heads, head = task % heads, last = lengths[r];
            int64_t first = window ? std::max<int64_t>(0, last - window) : 0;
            if (chunk) first = std::max(first, (last - 1) / chunk * chunk);
            const T* from = query.at<T>(r, head);
            if (cos) rotate(from, cos + r * D, sin + r * D, turned.data(), D), from = turned.data();
            one(from, keys, values, out + task * V, tables + r * table_stride, block_size, groups,
                head / (heads / groups), first, last, D, V, scale, scratch.data());
        }
    }
}

}  // namespace

extern "C" void kernel(const void* query, const void* key, const void* value, const void* cos, const void* sin, void* keys, void* values, const int32_t* slot_mapping,
                       const int32_t* tables, const int32_t* lengths, void* out, int64_t query_row, int64_t query_head,
                       int64_t key_row, int64_t key_head, int64_t value_row, int64_t value_head, int64_t rows, int64_t heads,
                       int64_t groups, int64_t D, int64_t V, int64_t block_size, int64_t table_stride, int64_t window,
                       int64_t chunk, int64_t write, int64_t rotated, int64_t is_bfloat16, float scale) {
    const auto of = [&](auto type) {
        using T = decltype(type);
        run<T>({query, query_row, query_head}, {key, key_row, key_head}, {value, value_row, value_head}, rotated ? (const T*)cos : nullptr, (const T*)sin, (T*)keys, (T*)values,
               slot_mapping, tables, lengths, (T*)out, rows, heads, groups, D, V, block_size, table_stride, window, chunk, write, scale);
    };
    is_bfloat16 ? of(Bfloat16()) : of(float());
}
