// The likeliest token of each sequence without a temperature, and handing tokens on: the end of `sample` on a CPU; built by `cpp.py`.
#include <algorithm>
#include <cstdint>

namespace {

// The first of the largest of `count` floats, given as their bits: as integers they are in the same order once negative ones are turned round.
template <typename Bits>
int64_t largest(const Bits* bits, int64_t count) {
    constexpr int sign = 8 * sizeof(Bits) - 1;
    const auto key = [](Bits one) { return Bits(one ^ (Bits(one >> sign) & Bits((uint64_t(1) << sign) - 1))); };
    Bits best = key(bits[0]);
    for (int64_t at = 1; at < count; at++) best = std::max(best, key(bits[at]));
    for (int64_t at = 0;; at++)
        if (key(bits[at]) == best) return at;
}

}  // namespace

extern "C" void kernel(const int16_t* logits, int64_t* ids, const float* temperature, const int32_t* slots, const int32_t* sampled,
                       const int32_t* positions, int32_t* last_tokens, int32_t* last_at, int64_t seqs, int64_t vocab, int64_t bytes) {
    for (int64_t seq = 0; seq < seqs; seq++) {
        if (!(temperature[seq] > 0)) {
            const int16_t* const own = logits + seq * vocab * bytes / 2;
            ids[seq] = bytes == 2 ? largest(own, vocab) : largest(reinterpret_cast<const int32_t*>(own), vocab);
        }
        if (sampled[seq] > 0) last_tokens[slots[seq]] = int32_t(ids[seq]), last_at[slots[seq]] = positions[seq];
    }
}
