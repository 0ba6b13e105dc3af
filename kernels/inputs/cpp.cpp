// A padded step looked up on a CPU: `unpack` of `reference.py`, sequence after sequence; built by `cpp.py`.
#include <algorithm>
#include <cstdint>

extern "C" void kernel(const int32_t* token_ids, const int32_t* slots, const int32_t* query_start, const int32_t* starts,
                       const int32_t* last_tokens, const int32_t* last_at, const int32_t* draft_tokens, const int32_t* tables, int32_t* out,
                       int32_t* out_tables, int32_t* seq_lens, int64_t* last, int64_t tokens, int64_t seqs, int64_t num_draft_tokens,
                       int64_t blocks, int64_t block_size, int64_t width) {
    std::fill(out, out + 3 * tokens, 0);
    int32_t *const ids = out, *const positions = out + tokens, *const slot_mapping = out + 2 * tokens;
    for (int64_t seq = 0; seq < seqs; seq++) {
        const int64_t begin = query_start[seq], end = query_start[seq + 1], slot = slots[seq];
        const int32_t first = token_ids[std::min(begin, tokens - 1)];
        const int32_t start = first < 0 ? last_at[slot] - 1 - first : starts[seq];
        const int32_t* const table = tables + slot * blocks;
        seq_lens[seq] = end > begin ? start + int32_t(end - begin) : 0;
        last[seq] = std::max(end - 1, int64_t(0));
        for (int64_t at = begin; at < end; at++) {
            const int32_t token = token_ids[at], position = start + int32_t(at - begin);
            ids[at] = token >= 0 ? token : token == -1 ? last_tokens[slot] : draft_tokens[slot * num_draft_tokens - 2 - token];
            positions[at] = position;
            slot_mapping[at] = table[position / block_size] * int32_t(block_size) + position % int32_t(block_size);
        }
        for (int64_t block = 0; block < width; block++)
            out_tables[seq * width + block] = block * block_size < seq_lens[seq] ? table[block] : 0;
    }
}
