// The draft tokens that a step accepts, and those for the next, on a CPU: `propose_ngram` of `reference.py`, slot after slot; built by `cpp.py`.
#include <algorithm>
#include <cstdint>

namespace {

// Tokens alike, `max_length` at most, of those that end with text[one] and text[other], one < other.
inline int64_t alike(const int32_t* text, int64_t one, int64_t other, int64_t max_length) {
    int64_t count = 0;
    while (count < max_length && one >= count && text[one - count] == text[other - count]) count++;
    return count;
}

// What may follow text's first `known` tokens, into draft_tokens [count] -> how long a match they rest on.
int64_t search(const int32_t* text, int64_t known, int32_t* draft_tokens, int64_t count, int64_t min_ngram, int64_t max_ngram, int64_t seen) {
    int64_t best = min_ngram - 1, behind = known - 1;
    for (int64_t at = known - 2; at >= 0 && best < max_ngram; at--) {  // of equals the latest counts
        if (text[at] != text[known - 1]) continue;
        const int64_t length = alike(text, at, known - 1, max_ngram);
        if (length > best) best = length, behind = at + 1;
    }
    for (int64_t i = 0; i < count; i++) draft_tokens[i] = text[behind + i % (known - behind)];
    return best < min_ngram ? 0 : alike(text, behind - 1, known - 1, seen);
}

}  // namespace

extern "C" void kernel(const int64_t* ids, const int32_t* token_ids, const int32_t* slots, const int32_t* query_start,
                       const int32_t* seq_lens, const int32_t* sampled, int32_t* last_tokens, int32_t* last_at, int32_t* history,
                       int32_t* draft_tokens, int32_t* found, int64_t seqs, int64_t width, int64_t count, int64_t min_ngram, int64_t max_ngram, int64_t seen) {
    const auto live = [&](int64_t query) { return query < seqs && query_start[query + 1] > query_start[query]; };
    for (int64_t query = 0; query < seqs; query++) found[query] = 0, found[seqs + query] = 0;
    for (int64_t first = 0, last; live(first); first = last) {  // a slot: a query, and one for each draft
        const int32_t slot = slots[first];
        int64_t accepted = 0;
        bool matches = true;
        for (last = first + 1; live(last) && slots[last] == slot; last++) {
            matches = matches && token_ids[query_start[last]] == ids[last - 1];
            accepted += matches;
        }
        for (int64_t query = first; query < last; query++) found[seqs + query] = token_ids[query_start[query + 1] - 1];
        if (last > first + 1) last_tokens[slot] = int32_t(ids[first + accepted]), last_at[slot] = seq_lens[first + accepted];
        int32_t* const text = history + slot * width;
        const int32_t* const fed = token_ids + query_start[first];
        const int64_t length = seq_lens[first], tokens = query_start[first + 1] - query_start[first];
        std::copy(fed, fed + tokens, text + length - tokens);
        if (last == first + 1 && !sampled[first]) continue;
        const int64_t known = std::min(length + accepted + 1, width);
        for (int64_t at = length; at < known; at++) text[at] = int32_t(ids[first + at - length]);
        int32_t* const next = draft_tokens + slot * count;
        const bool hit = next[0] == ids[first];
        found[first] = 2 * search(text, known, next, count, min_ngram, max_ngram, seen) + hit;
    }
}
