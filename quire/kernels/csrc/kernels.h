// What the kernels take and give, for every instruction set: plain pointers and sizes.
//
// All matrices are row-major and dense unless a stride is named; strides count elements. `bf16`
// arguments say whether activations are bfloat16 (true) or float32 (false).
#pragma once

#include <cstdint>
#include <vector>

namespace quire {

constexpr int64_t PAGE = 16;  // tokens of a KV page: one tile
constexpr int64_t LONGEST_HEAD = 256;

// One step's reads of the KV arena: read i lets rows [row, row + rows) see `keys` tokens, which
// lie in `pages[page...]` from slot `offset` of the first page on; token j stands at `position + j`.
struct Read {
    int64_t row, rows, page, offset, keys, position;
};

struct AttentionTask {
    int64_t read, row, rows, first_key, last_key;  // rows are tokens of the step
    int64_t scratch;  // first float of its partial results, or -1: writes the result itself
};

struct Part {
    int64_t scratch;  // of the row's first head within KV head 0
};

// The reads of a step cut into tasks of like cost, and for each row the partial results to merge.
struct AttentionPlan {
    std::vector<Read> reads;
    std::vector<int32_t> pages;
    std::vector<int64_t> positions;  // [tokens]
    std::vector<int32_t> kept;       // [reads, layers, kv_heads] leading keys that are valid, or none
    std::vector<AttentionTask> tasks;
    std::vector<int64_t> bundles;  // bundle b is tasks [bundles[b], bundles[b + 1])
    bool in_order;  // sums are taken in the order of the path; bundles are then levels of it
    std::vector<int64_t> part_start;  // [tokens + 1]
    std::vector<Part> parts;
    int64_t layers, kv_heads, group, head_dim, window, scratch_floats;  // of one KV head
};

struct AttentionArgs {
    const AttentionPlan* plan;
    const void* q;  // [tokens, heads, head_dim], tokens `q_stride` apart
    int64_t q_stride;
    void* out;           // [tokens, heads, head_dim]
    const void* keys;    // [pages, kv_heads, head_dim / pack, 16, pack] of this layer
    const void* values;  // [pages, kv_heads, 16 / pack, head_dim, pack]
    int64_t layer;
    float scale, softcap;  // softcap 0: none
    float* scratch;        // [kv_heads, scratch_floats]
    float* lse;            // [tokens, heads], log of the sum of exp(scores); or null
    bool bf16;
};

// Row i of [row, row + rows) reads of KV head h the chunks [i, h, :count] of a segment, each at most
// once: those with a mask of 1, or all. Chunk c is the entries [c * size, (c + 1) * size), as far as
// there are any; entry j stands at `position + j`, in slot `offset + j` of the segment's pages.
struct FetchRead {
    int64_t row, rows, entries, position, offset;
    const int32_t* page;
    const int64_t* chunks;  // [rows, kv_heads, count]
    const uint8_t* mask;    // as chunks, or null
    int64_t count, size;
};

struct FetchArgs {
    std::vector<FetchRead> reads;
    const void* q;  // as in AttentionArgs
    int64_t q_stride;
    const int64_t* positions;  // [tokens]
    float* out;  // [tokens, heads, head_dim], normalised
    float* lse;  // [tokens, heads]; what is read is merged into both
    const void *keys, *values;  // as in AttentionArgs
    int64_t kv_heads, group, head_dim, window;
    float scale, softcap;
    bool bf16;
};

// Of a segment's `all` chunks, the first `known` have a mean. Rows [row, row + rows) read of each KV
// head `count` of these, those that every query reads and those whose means fit best; and all after
// them. Their numbers are written, ascending.
struct ChooseRead {
    int64_t row, rows;
    const void* means;      // [kv_heads, known / 16, head_dim / pack, 16, pack], rounded up
    const uint8_t* always;  // [kv_heads, known], at most `count` for a head
    int64_t known, all, count;
    int64_t* chunks;  // [rows, kv_heads, count + all - known]
};

struct ChooseArgs {
    std::vector<ChooseRead> reads;
    const void* q;  // as in AttentionArgs
    int64_t q_stride;
    int64_t kv_heads, group, head_dim;
    float scale;
    bool bf16;
};

enum Numbers : int64_t { FLOAT = 0, BFLOAT = 1, EXPONENT = 2 };  // EXPONENT: a power of two's

// The keys or the values of one layer as codes: number = (code - 2^(bits - 1)) * scale + middle.
struct CodedSide {
    const uint8_t* codes;  // [kv_heads, pages, head_dim / 16, 32 * bits], see packed.cpp
    // [kv_heads, 16 * pages / group, head_dim] where groups lie along tokens, else [kv_heads,
    // head_dim / group, 16 * pages]. Without `middle` it is 0.
    const void *scale, *middle;
    int64_t bits, group, along_tokens, kind;
};

struct CodedLayer {
    CodedSide keys, values;
};

struct PackedSource {
    int64_t pages;
    std::vector<CodedLayer> layers;
};

// A step's reads of packed entries: read i of the cut is of sources[i], whose entry `offset` is its
// first key; `page` means nothing.
struct PackedPlan {
    AttentionPlan cut;
    std::vector<PackedSource> sources;
};

struct PackedArgs {
    const PackedPlan* plan;
    const void* q;  // as in AttentionArgs
    int64_t q_stride;
    float* out;  // [tokens, heads, head_dim], normalised
    float* lse;  // [tokens, heads]; what is read is merged into both
    int64_t layer;
    float scale, softcap;
    float* scratch;
    bool bf16;
};

// Rotates q in place (and k on the way) and stores k and v in the arena.
struct RotateArgs {
    void *q, *k;    // [tokens, heads or kv_heads, head_dim], tokens `stride` apart
    const void* v;
    int64_t q_stride, k_stride, v_stride;
    const float *cos, *sin;  // [tokens, rotated / 2]; rotated 0: no rotation
    const int64_t* slots;    // [tokens]
    void *keys, *values;     // as in AttentionArgs
    int64_t tokens, heads, kv_heads, head_dim, rotated;
    bool bf16;
};

// Copies what is in slots of the arena.
struct ReadArgs {
    const void *keys, *values;  // as in AttentionArgs
    const int64_t* slots;       // [tokens]
    void *k, *v;                // [kv_heads, tokens, head_dim]
    int64_t tokens, kv_heads, head_dim;
    bool bf16;
};

struct NormArgs {
    const void* x;  // [rows, width]
    void* out;      // [rows, width]
    const void* weight;
    int64_t rows, width;
    float eps, add;  // multiplies by weight + add
    bool bf16;
};

enum Activation : int64_t { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };

struct GateArgs {
    const void* x;  // [rows, 2 * width]: gate, then up; or, not gated, [rows, width]
    void* out;      // [rows, width]
    int64_t rows, width, activation;
    bool gated, bf16;
};

// out = x W^T (+ bias) (+ add), for W packed in tiles (products.cpp).
struct ProductArgs {
    const void* x;       // [rows, in], rows `x_stride` apart
    int64_t x_stride;
    void* out;           // [rows, out]
    const void* bias;    // [outs] or null
    const void* add;     // [rows, outs] or null; may be `out`
    int64_t rows, ins, outs;
    bool bf16;
    const void* weight;
    const float* scales;   // int8: [outs]; grouped: [outs / 16, groups, 16]
    const float* offsets;  // grouped: as scales, or null
    const int32_t* sums;   // int8: [outs] sums of a column's weights
    int64_t bits, group;   // grouped
    bool small;            // grouped: few rows may be rounded; groups are then whole blocks
};

struct SampleArgs {
    const float* logits;  // [rows, vocab]
    int64_t rows, vocab;
    const float *temperature, *top_p, *min_p;  // [rows]
    const int64_t* top_k;                      // [rows]; 0: all
    const double* draws;                       // [rows] in [0, 1)
    int64_t* chosen;                           // [rows]
};

// Sets the logits of tokens to -inf whose bit in the row's mask is 0, lowest bit first.
struct MaskArgs {
    float* logits;          // [.., vocab]
    const int64_t* rows;    // [count] distinct
    const uint32_t* masks;  // [count, words], words >= vocab / 32
    int64_t count, vocab, words;
};

struct Kernels {
    const char* name;
    void (*attend)(const AttentionArgs&);
    void (*choose)(const ChooseArgs&);
    bool (*attend_chosen)(const FetchArgs&);  // false: a chunk is not in its segment
    void (*attend_packed)(const PackedArgs&);
    void (*rotate_append)(const RotateArgs&);
    void (*read_slots)(const ReadArgs&);
    void (*rms_norm)(const NormArgs&);
    void (*gate)(const GateArgs&);
    void (*dense)(const ProductArgs&);
    void (*int8)(const ProductArgs&);
    void (*grouped)(const ProductArgs&);
    void (*argmax)(const float* logits, int64_t rows, int64_t vocab, int64_t* chosen);
    void (*sample)(const SampleArgs&);
    void (*mask)(const MaskArgs&);
};

}  // namespace quire
