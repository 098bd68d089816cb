/* test_device_decode.c - what kernels are told of a chunk: right, inside, and refused where damaged. */
#include <stdlib.h>
#include <string.h>

#include "backend.h"
#include "check.h"
#include "check_device.h"
#include "internal.h"

static const krul_codec codecs[] = {KRUL_CODEC_EXACT, KRUL_CODEC_INT8,       KRUL_CODEC_INT4,
                                    KRUL_CODEC_SHARE, KRUL_CODEC_SHARE_INT8, KRUL_CODEC_SHARE_INT4};
static const krul_dtype dtypes[] = {KRUL_DTYPE_F32, KRUL_DTYPE_F16, KRUL_DTYPE_BF16};

static uint32_t random_state = 1;

static uint32_t
next_random(void)
{
    random_state = random_state * 1664525u + 1013904223u;
    return random_state >> 8;
}

static void *
allocate(size_t n_bytes)
{
    void *memory = calloc(1, n_bytes + 1);
    if (memory == NULL) {
        abort();
    }
    return memory;
}

static krul_view
view_new(krul_dtype dtype, int64_t n_heads, int64_t n_tokens, int64_t head_dim)
{
    krul_view view = {
        .dtype = dtype,
        .device_type = KRUL_DEVICE_CPU,
        .shape = {1, n_heads, n_tokens, head_dim},
        .stride = {n_heads * n_tokens * head_dim, n_tokens * head_dim, head_dim, 1},
    };
    size_t n_elements = (size_t)(n_heads * n_tokens * head_dim);
    float *values = allocate(n_elements * sizeof *values);
    view.data = allocate(n_elements * krul_dtype_bytes(dtype));
    for (size_t i = 0; i < n_elements; i++) {
        values[i] = (float)next_random() / 0x1p24f - 0.3f;
    }
    krul_backend_at(krul_backend_count() - 1)
        ->narrow(dtype, values, (int64_t)n_elements, view.data);
    free(values);
    return view;
}

/* A coded block and the views it may be decoded to. */
typedef struct coded {
    krul_store_entry entry;
    krul_view views[2];
    uint8_t *payload;
    int n_views;
} coded;

static coded
coded_new(krul_codec codec, krul_kv kv, krul_dtype dtype, int64_t n_heads, int64_t n_tokens,
          int64_t head_dim, int n_views)
{
    coded out = {.n_views = n_views};
    size_t capacity = 0, n_bytes = 0;
    krul_codec used = codec;
    for (int i = 0; i < 2; i++) {
        out.views[i] = view_new(dtype, n_heads, n_tokens, head_dim);
    }
    CHECK(krul_compressor_bound(out.views, n_views, &capacity, NULL) == KRUL_STATUS_OK);
    out.payload = allocate(capacity);
    CHECK(krul_compressor_encode(check_best_backend(), codec, kv, out.views, n_views, out.payload,
                                 capacity, &n_bytes, &used, NULL, NULL) == KRUL_STATUS_OK);
    CHECK(used == codec);
    out.entry = (krul_store_entry){
        .kind = KRUL_STORE_ENTRY_BLOCK,
        .codec = codec,
        .kv = kv,
        .dtype = dtype,
        .layer_lower = 7,
        .layer_upper = n_views == 2 ? 9 : -1,
        .n_batch = 1,
        .n_heads = (int32_t)n_heads,
        .head_dim = (int32_t)head_dim,
        .token_start = 128,
        .n_tokens = n_tokens,
        .payload_bytes = n_bytes,
    };
    return out;
}

static void
coded_free(coded *block)
{
    free(block->payload);
    for (int i = 0; i < 2; i++) {
        free(block->views[i].data);
    }
}

static krul_device_block
block_of(const coded *from, uint64_t payload_offset)
{
    krul_device_block block = {.entry = &from->entry, .payload_offset = payload_offset};
    memcpy(block.views, from->views, sizeof block.views);
    if (from->n_views == 1) {
        block.views[1].data = NULL;
    }
    return block;
}

/* What came of one call. */
typedef struct verdict {
    krul_status status;
    krul_error err;
    int32_t bad_block;
    int32_t n_batches;
    size_t used_bytes;
    krul_device_batch batches[KRUL_DEVICE_MAX_BATCHES];
    bool is_sound; /* as check_device_batches has it */
    bool is_changed; /* was a byte in use written, or one behind the chunk? */
} verdict;

/* A chunk that holds payload_bytes of a payload from offset 16 on and has `room` bytes more. */
static verdict
prepare_one(const krul_device_block *block, const uint8_t *payload, size_t payload_bytes,
            size_t room)
{
    size_t used = KRUL_DEVICE_ALIGNMENT + payload_bytes;
    verdict out = {.bad_block = -1, .n_batches = -1, .used_bytes = 12345};
    uint8_t *chunk = aligned_alloc(16, (used + room + 31) / 16 * 16);
    if (chunk == NULL) {
        abort();
    }
    memset(chunk, 0xc3, used + room);
    memcpy(chunk + KRUL_DEVICE_ALIGNMENT, payload, payload_bytes);
    out.status = krul_device_decode_prepare(chunk, used + room, used, block, 1, out.batches,
                                            &out.n_batches, &out.used_bytes, &out.bad_block,
                                            &out.err);
    out.is_changed = memcmp(chunk + KRUL_DEVICE_ALIGNMENT, payload, payload_bytes) != 0;
    for (int i = 0; i < KRUL_DEVICE_ALIGNMENT; i++) {
        out.is_changed |= chunk[i] != 0xc3;
    }
    if (out.status == KRUL_STATUS_OK) {
        checked_chunk checked = {chunk, used, out.used_bytes};
        out.is_sound = out.used_bytes <= used + room &&
                       check_device_batches(&checked, out.batches, out.n_batches);
    }
    free(chunk);
    return out;
}

static void
test_every_codec(void)
{
    static const int64_t n_tokens[] = {1, 20, 63, 64, 65, 130, 200};
    static const int64_t head_dims[] = {1, 3, 64, 72, 80, 128};
    for (size_t c = 0; c < KRUL_LENGTH(codecs); c++) {
        for (size_t d = 0; d < KRUL_LENGTH(dtypes); d++) {
            for (size_t n = 0; n < KRUL_LENGTH(n_tokens); n++) {
                for (size_t h = 0; h < KRUL_LENGTH(head_dims); h++) {
                    bool is_pair = krul_codec_n_layers(codecs[c]) == 2 ||
                                   (codecs[c] == KRUL_CODEC_EXACT && n % 2 == 1);
                    coded made = coded_new(codecs[c], (krul_kv)(h % 2), dtypes[d], 2, n_tokens[n],
                                           head_dims[h], is_pair ? 2 : 1);
                    krul_device_block block = block_of(&made, 16);
                    if (is_pair && d == 1) {
                        block.views[n % 2].data = NULL;
                    }
                    if (n_tokens[n] > 1 && h % 2 == 0) {
                        block.views[0].shape[2] = block.views[1].shape[2] = n_tokens[n] / 2;
                    }
                    size_t bound = krul_device_decode_bound(&block, 1);
                    verdict found = prepare_one(&block, made.payload,
                                                (size_t)made.entry.payload_bytes, bound);
                    CHECK(found.status == KRUL_STATUS_OK);
                    CHECK(found.is_sound && !found.is_changed);
                    CHECK(found.n_batches >= 1 && found.n_batches <= 2);
                    if (codecs[c] != KRUL_CODEC_EXACT) {
                        bool is_wide = head_dims[h] % (16 / (int64_t)krul_dtype_bytes(dtypes[d])) ==
                                       0;
                        bool is_split = head_dims[h] == 72 && c % 3 == 2 && d != 0;
                        CHECK(found.batches[0].codec == codecs[c]);
                        CHECK(found.batches[0].is_wide == (is_wide && !is_split));
                        CHECK(found.batches[0].dtype == dtypes[d]);
                    }
                    /* No more room than is needed is enough; one byte less is not. */
                    size_t used = 16 + (size_t)made.entry.payload_bytes;
                    size_t needed = found.used_bytes - used;
                    CHECK(needed <= bound);
                    found = prepare_one(&block, made.payload, (size_t)made.entry.payload_bytes,
                                        needed);
                    CHECK(found.status == KRUL_STATUS_OK);
                    found = prepare_one(&block, made.payload, (size_t)made.entry.payload_bytes,
                                        needed - 1);
                    CHECK(found.status == KRUL_STATUS_BAD_VALUE && found.err.message[0] != '\0');
                    CHECK(found.n_batches == -1 && found.used_bytes == 12345);
                    coded_free(&made);
                }
            }
        }
    }
}

static void
test_truncation(void)
{
    for (size_t c = 0; c < KRUL_LENGTH(codecs); c++) {
        coded made = coded_new(codecs[c], KRUL_KV_KEY, KRUL_DTYPE_BF16, 2, 40, 24,
                               krul_codec_n_layers(codecs[c]));
        krul_store_entry entry = made.entry;
        for (uint64_t n = 1; n < made.entry.payload_bytes + 3; n++) {
            krul_device_block block = block_of(&made, 16);
            uint8_t *payload = allocate((size_t)n);
            memcpy(payload, made.payload,
                   (size_t)krul_min_i64((int64_t)n, (int64_t)made.entry.payload_bytes));
            entry.payload_bytes = n;
            block.entry = &entry;
            verdict found = prepare_one(&block, payload, (size_t)n, 1 << 16);
            if (n == made.entry.payload_bytes) {
                CHECK(found.status == KRUL_STATUS_OK && found.is_sound);
            }
            else {
                CHECK(found.status == KRUL_STATUS_CORRUPT);
                CHECK(found.bad_block == 0 && found.n_batches == -1);
                CHECK(strstr(found.err.message, "blocks[0], layer 7, tokens from 128: ") != NULL);
            }
            free(payload);
        }
        coded_free(&made);
    }
}

/* Refused, or harmless: descriptors stay inside whatever the payload says. */
static void
test_bit_flips(void)
{
    for (size_t c = 0; c < KRUL_LENGTH(codecs); c++) {
        coded made = coded_new(codecs[c], KRUL_KV_VALUE, KRUL_DTYPE_F16, 1, 41, 16,
                               krul_codec_n_layers(codecs[c]));
        int n_refused = 0;
        for (uint64_t bit = 0; bit < 8 * made.entry.payload_bytes; bit++) {
            krul_device_block block = block_of(&made, 16);
            made.payload[bit / 8] ^= (uint8_t)(1u << bit % 8);
            verdict found = prepare_one(&block, made.payload, (size_t)made.entry.payload_bytes,
                                        1 << 16);
            CHECK(found.status == KRUL_STATUS_CORRUPT ||
                  (found.status == KRUL_STATUS_OK && found.is_sound));
            n_refused += found.status != KRUL_STATUS_OK;
            made.payload[bit / 8] ^= (uint8_t)(1u << bit % 8);
        }
        /* Two positions, a header: of int8 and int4 the length is all there is to look at. */
        CHECK((n_refused > 0) == (codecs[c] == KRUL_CODEC_EXACT || c >= 3));
        coded_free(&made);
    }
}

/* One wrong argument. */
static void
check_refused(const coded *made, const krul_device_block *block, krul_status status,
              const char *words)
{
    verdict found = prepare_one(block, made->payload, (size_t)made->entry.payload_bytes, 1 << 16);
    CHECK(found.status == status && found.err.status == status);
    CHECK(strstr(found.err.message, words) != NULL);
    CHECK(found.bad_block == 0 && found.n_batches == -1 && found.used_bytes == 12345);
}

static void
test_arguments(void)
{
    coded made = coded_new(KRUL_CODEC_SHARE, KRUL_KV_KEY, KRUL_DTYPE_F32, 2, 50, 8, 2);
    coded single = coded_new(KRUL_CODEC_INT8, KRUL_KV_KEY, KRUL_DTYPE_F32, 2, 50, 8, 1);
    const krul_device_block sound = block_of(&made, 16);
    krul_device_block block = sound;
    krul_store_entry entry = made.entry;

    block.payload_offset = 8;
    check_refused(&made, &block, KRUL_STATUS_BAD_VALUE, "payload_offset is 8 with");
    block.payload_offset = 32;
    check_refused(&made, &block, KRUL_STATUS_BAD_VALUE, "payload_offset is 32 with");
    block.payload_offset = (uint64_t)1 << 63;
    check_refused(&made, &block, KRUL_STATUS_BAD_VALUE, "payload_offset is 9223372036854775808");

    block = sound;
    block.views[1].dtype = KRUL_DTYPE_BF16;
    check_refused(&made, &block, KRUL_STATUS_BAD_DTYPE,
                  "views[1] is bfloat16 but the block float32");
    block = sound;
    block.views[0].shape[3] = 7;
    check_refused(&made, &block, KRUL_STATUS_BAD_SHAPE, "views[0] is (1, 2, 50, 7) but the block");
    block = sound;
    block.views[0].shape[2] = 0;
    check_refused(&made, &block, KRUL_STATUS_BAD_SHAPE, "views[0] is (1, 2, 0, 8)");
    block = sound;
    block.views[0].shape[2] = 51;
    block.views[0].stride[1] = 51 * 8;
    check_refused(&made, &block, KRUL_STATUS_BAD_SHAPE, "views[0] is (1, 2, 51, 8)");
    block = sound;
    block.views[0].shape[2] = 20;
    check_refused(&made, &block, KRUL_STATUS_BAD_SHAPE, "views[0] has 20 tokens but views[1] 50");
    block = sound;
    block.views[1].is_read_only = true;
    check_refused(&made, &block, KRUL_STATUS_BAD_VALUE, "views[1]");
    block = sound;
    block.views[1].data = block.views[0].data;
    check_refused(&made, &block, KRUL_STATUS_BAD_VALUE, "views[0]");

    block = block_of(&single, 16);
    block.views[1] = single.views[1];
    check_refused(&single, &block, KRUL_STATUS_BAD_SHAPE, "views[1] is wanted of a block of 1");

    block = sound;
    entry.n_tokens = 0;
    block.entry = &entry;
    check_refused(&made, &block, KRUL_STATUS_BAD_VALUE, "n_tokens");
    entry = made.entry;
    entry.kind = KRUL_STORE_ENTRY_META;
    check_refused(&made, &block, KRUL_STATUS_BAD_VALUE, "");
    entry = single.entry;
    entry.codec = KRUL_CODEC_PREDICT;
    entry.kv = KRUL_KV_BOTH;
    check_refused(&made, &block, KRUL_STATUS_UNSUPPORTED, "codec 7");
    CHECK(!krul_device_decode_is_supported(&entry));
    CHECK(krul_device_decode_is_supported(&made.entry));

    /* Decoded by the CPU, K and V of codec predict can be moved; not if they are not all there. */
    size_t view_bytes = 2 * 50 * 8 * 4;
    uint8_t *elements = allocate(2 * view_bytes);
    block.is_decoded = true;
    verdict found = prepare_one(&block, elements, 2 * view_bytes, 1 << 16);
    CHECK(found.status == KRUL_STATUS_OK && found.is_sound && found.n_batches == 1);
    CHECK(found.batches[0].codec == KRUL_DEVICE_CODEC_RAW && found.batches[0].n_units == 4);
    found = prepare_one(&block, elements, 2 * view_bytes - 1, 1 << 16);
    CHECK(found.status == KRUL_STATUS_BAD_VALUE);
    CHECK(strstr(found.err.message, "decoded elements of views[1] end at") != NULL);
    block.views[0].data = NULL;
    found = prepare_one(&block, elements, view_bytes, 1 << 16);
    CHECK(found.status == KRUL_STATUS_OK && found.is_sound && found.batches[0].n_units == 2);
    free(elements);

    /* Nothing wanted: nothing to do, and the payload is not looked at. */
    block = sound;
    block.views[0].data = block.views[1].data = NULL;
    found = prepare_one(&block, made.payload, (size_t)made.entry.payload_bytes, 1 << 16);
    CHECK(found.status == KRUL_STATUS_OK && found.n_batches == 0);

    found = prepare_one(&sound, made.payload, (size_t)made.entry.payload_bytes, 0);
    CHECK(found.status == KRUL_STATUS_BAD_VALUE && found.bad_block == -1);
    coded_free(&made);
    coded_free(&single);
}

/* Blocks of all kinds at once: a batch for each kind, and the one that is bad is named. */
static void
test_many(void)
{
    enum { N_BLOCKS = 36 };
    coded made[N_BLOCKS];
    krul_device_block blocks[N_BLOCKS];
    size_t used = 0;
    uint8_t *chunk = aligned_alloc(16, 1 << 20);
    for (int i = 0; i < N_BLOCKS; i++) {
        krul_codec codec = codecs[i % 6];
        made[i] = coded_new(codec, (krul_kv)(i / 18), dtypes[i / 6 % 3], 1, 70 + i, 16,
                            krul_codec_n_layers(codec));
        used = (used + 15) / 16 * 16;
        blocks[i] = block_of(&made[i], used);
        memcpy(chunk + used, made[i].payload, (size_t)made[i].entry.payload_bytes);
        used += (size_t)made[i].entry.payload_bytes;
    }
    krul_device_batch batches[KRUL_DEVICE_MAX_BATCHES];
    int32_t n_batches = 0, bad_block = -1;
    size_t used_now = 0;
    size_t room = krul_device_decode_bound(blocks, N_BLOCKS);
    CHECK(used + room <= 1 << 20);
    CHECK(krul_device_decode_prepare(chunk, used + room, used, blocks, N_BLOCKS, batches,
                                     &n_batches, &used_now, &bad_block, NULL) == KRUL_STATUS_OK);
    CHECK(n_batches == 18 && bad_block == -1);
    checked_chunk checked = {chunk, used, used_now};
    CHECK(check_device_batches(&checked, batches, n_batches));
    /* The positions that a shared block keeps. */
    chunk[blocks[21].payload_offset + 3] ^= 0x40;
    krul_error err;
    CHECK(krul_device_decode_prepare(chunk, used + room, used, blocks, N_BLOCKS, batches,
                                     &n_batches, &used_now, &bad_block,
                                     &err) == KRUL_STATUS_CORRUPT);
    CHECK(bad_block == 21 && strstr(err.message, "blocks[21], layer 7") != NULL);
    for (int i = 0; i < N_BLOCKS; i++) {
        coded_free(&made[i]);
    }
    free(chunk);
}

int
main(void)
{
    test_every_codec();
    test_truncation();
    test_bit_flips();
    test_arguments();
    test_many();
    return check_finish();
}
