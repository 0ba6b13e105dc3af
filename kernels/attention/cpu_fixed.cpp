// Attention of any rows on a CPU with one order of sums, in float32, built by `cpu_fixed.py`.
// A row's keys are taken in tiles of 64 positions, counted from the sequence's first; tiles are added up from left to right.
// So what a row gives depends on its own position and on nothing else. A task is a few neighbouring rows of one sequence and
// the query heads of one KV head: tiles are brought to float32 once for all of them.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t TILE = 64;            // keys
constexpr int64_t LANES = 32;           // rows and heads of a task, unless a KV head has more heads
constexpr int64_t AT_ONCE = 4;          // lanes whose sums are held in registers
constexpr int64_t PARALLEL = 1000000;   // multiplications: from here on waking a team pays

typedef float V __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
constexpr int64_t W = 16;

struct Bfloat16 { uint16_t bits; };
struct E4m3 { uint8_t bits; };

inline float of_bits(uint32_t bits) {
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
inline float wide(float x) { return x; }
inline float wide(Bfloat16 x) { return of_bits(uint32_t(x.bits) << 16); }
inline float wide(E4m3 x) {  // the exponent's bias goes from 7 to 127 by a product, which is right for subnormals too
    const float size = of_bits(uint32_t(x.bits & 0x7f) << 20) * of_bits(uint32_t(127 + 120) << 23);
    return (x.bits & 0x7f) == 0x7f ? of_bits(0x7fc00000) : x.bits & 0x80 ? -size : size;
}
inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, Bfloat16* out) {  // to nearest even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    out->bits = x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

inline V load(const float* at) {
    V out;
    std::memcpy(&out, at, sizeof(V));
    return out;
}
inline void store(float* at, V x) { std::memcpy(at, &x, sizeof(V)); }
inline V all(float x) { return V{} + x; }

// e ** x for x <= 0, to 2e-7 of it, 1 for 0: as `cpu_decode.cpp`, sixteen at a time.
inline V exp_of(V x) {
    x = x > -87.0f ? x : all(-87.0f);
    const I n = __builtin_convertvector(x * 1.442695041f - 0.5f, I);
    const V whole = __builtin_convertvector(n, V);
    const V r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    const V p = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f))))));
    return p * (V)((n + 127) << 23);
}

inline float sum_of(V x) {
    float parts[W];
    store(parts, x);
    for (int64_t step = W / 2; step; step /= 2)
        for (int64_t i = 0; i < step; i++) parts[i] += parts[i + step];
    return parts[0];
}

// Elements e of two vectors change places where bit S of e says so: four such rounds transpose 16 x 16.
template <int S>
inline void exchange(V& a, V& b) {
#define LOW(e) ((e) & S ? 16 + (e) - S : (e))
#define HIGH(e) ((e) & S ? 16 + (e) : (e) + S)
#define ALL(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
    const V low = __builtin_shufflevector(a, b, ALL(LOW)), high = __builtin_shufflevector(a, b, ALL(HIGH));
#undef ALL
#undef HIGH
#undef LOW
    a = low, b = high;
}
template <int S>
inline void exchange_all(V* rows) {
    for (int i = 0; i < 16; i++)
        if (!(i & S)) exchange<S>(rows[i], rows[i + S]);
}

template <typename C>
inline V widened(const C* from, int64_t size) {  // the first elements of up to 16, then zeros
    float out[W] = {};
    if (size >= W)
        for (int64_t i = 0; i < W; i++) out[i] = wide(from[i]);
    else
        for (int64_t i = 0; i < size; i++) out[i] = wide(from[i]);
    return load(out);
}

// Logits of four lanes and one tile: lane i's [64] at out + i * TILE of its query [D] at q + i * D and keys [D, 64].
void products(const float* q, const float* keys, float* out, int64_t D) {
    V sums[AT_ONCE][TILE / W] = {};
    for (int64_t d = 0; d < D; d++)
        for (int64_t i = 0; i < AT_ONCE; i++)
            for (int64_t v = 0; v < TILE / W; v++) sums[i][v] += q[i * D + d] * load(keys + d * TILE + v * W);
    for (int64_t i = 0; i < AT_ONCE; i++)
        for (int64_t v = 0; v < TILE / W; v++) store(out + i * TILE + v * W, sums[i][v]);
}

// Of four lanes, N * 16 columns of what is summed up [.., stride]: times alpha, plus weights [64] of values [64, stride].
template <int64_t N>
void add_values(float* acc, const float* alpha, const float* weights, const float* values, int64_t count, int64_t stride) {
    V sums[AT_ONCE][N];
    for (int64_t i = 0; i < AT_ONCE; i++)
        for (int64_t v = 0; v < N; v++) sums[i][v] = load(acc + i * stride + v * W) * alpha[i];
    for (int64_t j = 0; j < count; j++)
        for (int64_t i = 0; i < AT_ONCE; i++)
            for (int64_t v = 0; v < N; v++) sums[i][v] += weights[i * TILE + j] * load(values + j * stride + v * W);
    for (int64_t i = 0; i < AT_ONCE; i++)
        for (int64_t v = 0; v < N; v++) store(acc + i * stride + v * W, sums[i][v]);
}

// One lane's logits [64], of which `from` to `to` are seen, become weights; m and l are brought up to date -> alpha.
float weigh(float* logits, int64_t from, int64_t to, float scale, float softcap, float& m, float& l) {
    if (from >= to) {
        std::fill(logits, logits + TILE, 0.0f);
        return 1;
    }
    const I places = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const V none = all(-3e38f);
    V largest = none;
    for (int64_t v = 0; v < TILE; v += W) {
        const I at = places + int32_t(v), seen = (at >= int32_t(from)) & (at < int32_t(to));
        V x = load(logits + v) * scale;
        if (softcap) {  // tanh(y) = (1 - e ** -2y) / (1 + e ** -2y), odd
            const V size = x < 0 ? -x : x, power = exp_of(size * (-2 / softcap)), capped = softcap * ((1 - power) / (1 + power));
            x = x < 0 ? -capped : capped;
        }
        x = seen ? x : none;
        largest = largest > x ? largest : x;
        store(logits + v, x);
    }
    float most = m;
    for (int64_t e = 0; e < W; e++) most = std::max(most, largest[e]);
    const float alpha = exp_of(all(m - most))[0];
    V sum = {};
    for (int64_t v = 0; v < TILE; v += W) {
        const V x = load(logits + v), weights = x > none ? exp_of(x - most) : V{};
        store(logits + v, weights);
        sum += weights;
    }
    l = l * alpha + sum_of(sum);
    m = most;
    return alpha;
}

struct Heads {  // [rows, heads, size], elements of a head side by side
    const void* data;
    int64_t row_stride, head_stride;

    template <typename T>
    const T* at(int64_t row, int64_t head) const { return (const T*)data + row * row_stride + head * head_stride; }
};

struct Task { int64_t sequence, row, rows, group; };  // `row`: among the step's

struct Step {
    Heads query;
    const void *keys, *values;
    const float* sinks;
    const int32_t *tables, *query_start, *seq_lens;
    int64_t heads, groups, D, V_, block_size, table_stride, window, chunk;
    float scale, softcap;
};

template <typename T, typename C>
void attend(const Step& s, const Task& task, T* out, std::vector<float>& scratch) {
    const int64_t D = (s.D + W - 1) / W * W, E = (s.V_ + W - 1) / W * W, shared = s.heads / s.groups;
    const int64_t used = task.rows * shared, lanes = (used + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
    scratch.assign(lanes * (D + E + TILE + 3) + TILE * (D + E), 0.0f);
    float *q = scratch.data(), *acc = q + lanes * D, *logits = acc + lanes * E, *m = logits + lanes * TILE, *l = m + lanes;
    float *alpha = l + lanes, *keys = alpha + lanes, *values = keys + TILE * D;
    const int64_t begin = s.query_start[task.sequence], count = s.query_start[task.sequence + 1] - begin;
    const int64_t first = s.seq_lens[task.sequence] - count + task.row - begin;  // position of the task's first row
    const auto lowest = [&](int64_t position) {
        int64_t at = s.window ? std::max<int64_t>(0, position - s.window + 1) : 0;
        return s.chunk ? std::max(at, position / s.chunk * s.chunk) : at;
    };
    for (int64_t i = 0; i < lanes; i++) {
        const int64_t head = task.group * shared + i % shared;
        for (int64_t d = 0; i < used && d < s.D; d++) q[i * D + d] = wide(s.query.at<T>(task.row + i / shared, head)[d]);
        m[i] = s.sinks && i < used ? s.sinks[head] : -3e38f;
        l[i] = s.sinks ? 1 : 0;
    }
    const int64_t end = first + task.rows;  // of the keys that the last row sees
    const int32_t* const table = s.tables + task.sequence * s.table_stride;
    for (int64_t start = lowest(first) / TILE * TILE; start < end; start += TILE) {
        const int64_t known = std::min(TILE, end - start);
        for (int64_t j = 0; j < TILE; j += W) {
            V rows[W];
            const C* at[W];
            for (int64_t e = 0; e < W && j + e < known; e++) {
                const int64_t token = start + j + e, slot = table[token / s.block_size] * s.block_size + token % s.block_size;
                at[e] = (const C*)s.keys + (slot * s.groups + task.group) * s.D;
                const C* const value = (const C*)s.values + (slot * s.groups + task.group) * s.V_;
                for (int64_t d = 0; d < E; d += W) store(values + (j + e) * E + d, widened(value + d, s.V_ - d));
            }
            for (int64_t d = 0; d < D; d += W) {
                for (int64_t e = 0; e < W; e++) rows[e] = j + e < known ? widened(at[e] + d, s.D - d) : V{};
                exchange_all<8>(rows), exchange_all<4>(rows), exchange_all<2>(rows), exchange_all<1>(rows);
                for (int64_t e = 0; e < W; e++) store(keys + (d + e) * TILE + j, rows[e]);
            }
        }
        for (int64_t i = 0; i < lanes; i += AT_ONCE) {
            products(q + i * D, keys, logits + i * TILE, D);
            for (int64_t one = i; one < i + AT_ONCE; one++) {
                const int64_t position = first + one / shared;
                const int64_t to = one < used ? std::min(TILE, position + 1 - start) : 0;
                alpha[one] = weigh(logits + one * TILE, std::max<int64_t>(0, lowest(position) - start), to, s.scale, s.softcap, m[one], l[one]);
            }
            int64_t at = 0;
            for (; at + 4 * W <= E; at += 4 * W) add_values<4>(acc + i * E + at, alpha + i, logits + i * TILE, values + at, known, E);
            for (; at < E; at += W) add_values<1>(acc + i * E + at, alpha + i, logits + i * TILE, values + at, known, E);
        }
    }
    for (int64_t i = 0; i < used; i++) {
        T* const to = out + ((task.row + i / shared) * s.heads + task.group * shared + i % shared) * s.V_;
        for (int64_t d = 0; d < s.V_; d++) narrow(acc[i * E + d] / l[i], to + d);
    }
}

template <typename T, typename C>
void run(const Step& s, T* out, int64_t sequences) {
    std::vector<Task> tasks;
    const int64_t most = std::max<int64_t>(1, LANES / (s.heads / s.groups));
    int64_t work = 0;
    for (int64_t r = 0; r < sequences; r++)
        for (int64_t row = s.query_start[r]; row < s.query_start[r + 1]; row += most) {
            const int64_t rows = std::min<int64_t>(most, s.query_start[r + 1] - row);
            work += rows * s.seq_lens[r] * s.heads * (s.D + s.V_);
            for (int64_t group = 0; group < s.groups; group++) tasks.push_back({r, row, rows, group});
        }
#pragma omp parallel if (work > PARALLEL)
    {
        std::vector<float> scratch;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < (int64_t)tasks.size(); i++) attend<T, C>(s, tasks[i], out, scratch);
    }
}

void copy(const Heads& from, void* to, const int32_t* slots, int64_t rows, int64_t heads, int64_t bytes, int64_t element) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t h = 0; h < heads; h++)
            std::memcpy((char*)to + (slots[r] * heads + h) * bytes, (const char*)from.data + (r * from.row_stride + h * from.head_stride) * element, bytes);
}

}  // namespace

// kind: 0 float32, 1 bfloat16, 2 float32 over blocks of e4m3, 3 bfloat16 over them, whose keys and values are there already.
extern "C" void kernel(const void* query, const void* key, const void* value, void* keys, void* values, const int32_t* slot_mapping,
                       const int32_t* tables, const int32_t* query_start, const int32_t* seq_lens, const float* sinks, void* out,
                       int64_t query_row, int64_t query_head, int64_t key_row, int64_t key_head, int64_t value_row, int64_t value_head,
                       int64_t sequences, int64_t heads, int64_t groups, int64_t D, int64_t V_, int64_t block_size, int64_t table_stride,
                       int64_t window, int64_t chunk, int64_t has_sinks, int64_t kind, float scale, float softcap) {
    if (kind < 2) {
        const int64_t rows = query_start[sequences], element = kind ? 2 : 4;
        copy({key, key_row, key_head}, keys, slot_mapping, rows, groups, D * element, element);
        copy({value, value_row, value_head}, values, slot_mapping, rows, groups, V_ * element, element);
    }
    const Step step{{query, query_row, query_head}, keys, values, has_sinks ? sinks : nullptr, tables, query_start, seq_lens,
                    heads, groups, D, V_, block_size, table_stride, window, chunk, scale, softcap};
    if (kind == 0) run<float, float>(step, (float*)out, sequences);
    if (kind == 1) run<Bfloat16, Bfloat16>(step, (Bfloat16*)out, sequences);
    if (kind == 2) run<float, E4m3>(step, (float*)out, sequences);
    if (kind == 3) run<Bfloat16, E4m3>(step, (Bfloat16*)out, sequences);
}
