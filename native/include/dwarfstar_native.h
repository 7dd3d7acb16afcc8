/* DwarfStar's native helper: a C ABI for ctypes.
 *
 * Theory. llama.cpp is used unmodified and unlinked: functions of ggml arrive as addresses, tensors stay opaque.
 * Objects (ds_vfile, ds_filler, ds_tap) are made by ds_…_open or _new and freed by ds_…_close or _free; they own
 * nothing of the caller's, so buffers given to them must outlive their use.
 *
 * Errors. Every function that can fail returns a negative ds_status; nothing throws and nothing aborts. Where a
 * callback of llama.cpp leaves no room for a result, the object keeps its first error until asked.
 *
 * Threads. Functions without an object are re-entrant. ds_vfile_pread and ds_fill_tensor may run on several
 * threads at once; everything else on one object is for one thread at a time.
 */
#ifndef DWARFSTAR_NATIVE_H
#define DWARFSTAR_NATIVE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32) && defined(DS_BUILDING)
#define DS_API __declspec(dllexport)
#elif defined(_WIN32)
#define DS_API __declspec(dllimport)
#else
#define DS_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised with every change of a signature, a struct or a byte layout; native.py refuses another number. */
#define DS_ABI_VERSION 4
DS_API int32_t ds_abi_version(void);

enum ds_status {
    DS_OK = 0,
    DS_E_ARG = -1,         /* a null pointer, negative count, unknown dtype: the caller's fault */
    DS_E_RANGE = -2,       /* an id, offset or extent outside what there is */
    DS_E_SIZE = -3,        /* a buffer is smaller or larger than the sizes given say */
    DS_E_IO = -4,          /* a read failed or came up short */
    DS_E_NAME = -5,        /* a tensor that is not in the table */
    DS_E_OVERFLOW = -6,    /* more rows than the buffer given holds */
    DS_E_DATA = -7,        /* encoded data that no encoder writes, or logits without a finite maximum */
    DS_E_MEMORY = -8,      /* out of memory, or no thread could be started */
    DS_E_UNSUPPORTED = -9, /* this platform has no such call, or this frame needs the general way */
    DS_E_DECODE = -10,     /* llama_decode refused: ds_stage_error has its answer */
    DS_E_GAP = -11,        /* rows that do not follow what their slot holds, or holds still */
    DS_E_GUESS = -12,      /* no token was drawn: the row's own token was guessed wrongly */
};

/* ---- virtual file ------------------------------------------------------------------------------------------ */

enum ds_extent_kind { DS_EXTENT_MEMORY = 0, DS_EXTENT_FILE = 1, DS_EXTENT_ZEROS = 2 };

typedef struct ds_extent {
    int32_t kind;
    int32_t fd;       /* DS_EXTENT_FILE: borrowed during ds_vfile_open, which duplicates it */
    const void *data; /* DS_EXTENT_MEMORY: borrowed until ds_vfile_close */
    uint64_t offset;  /* DS_EXTENT_FILE */
    uint64_t size;
} ds_extent;

typedef struct ds_vfile ds_vfile;

/* Extents in order form one file. A file extent past the end of its file is DS_E_RANGE, with *bad its index. */
DS_API int32_t ds_vfile_open(const ds_extent *extents, size_t n, ds_vfile **out, size_t *bad);
DS_API void ds_vfile_close(ds_vfile *file);
DS_API uint64_t ds_vfile_size(const ds_vfile *file);
/* Bytes delivered so far, by FILE* and pread together. Read-ahead of stdio counts. */
DS_API uint64_t ds_vfile_bytes_read(const ds_vfile *file);
/* Bytes read, fewer than n only at the end of the file; or a negative status. */
DS_API int64_t ds_vfile_pread(ds_vfile *file, void *buffer, uint64_t n, uint64_t offset);
/* The file as a read-only, seekable FILE*, the same one each time; closed by ds_vfile_close, never by fclose.
 * NULL where the platform has neither fopencookie nor funopen: use ds_fill_tensor there. */
DS_API void *ds_vfile_stream(ds_vfile *file);

/* ---- addresses of ggml functions --------------------------------------------------------------------------- */

struct ggml_tensor; /* opaque */
typedef const char *(*ds_get_name_fn)(const struct ggml_tensor *);
typedef size_t (*ds_nbytes_fn)(const struct ggml_tensor *);
typedef void (*ds_tensor_get_fn)(const struct ggml_tensor *, void *data, size_t offset, size_t size);
typedef void (*ds_tensor_set_fn)(struct ggml_tensor *, const void *data, size_t offset, size_t size);
typedef void (*ds_to_float_fn)(const void *x, float *y, int64_t k);

/* ---- tensor filler: the fallback for llama_model_init_from_user -------------------------------------------- */

typedef struct ds_filler ds_filler;

/* names[i] lies at offsets[i], sizes[i] bytes, in the virtual file. chunk_bytes bounds the staging buffer; 0 sets
 * each tensor in one piece, which back-ends with repacked or split tensors demand. */
DS_API int32_t ds_filler_new(ds_vfile *file, const char *const *names, const uint64_t *offsets, const uint64_t *sizes,
                             size_t n, uint64_t chunk_bytes, ds_get_name_fn get_name, ds_nbytes_fn nbytes,
                             ds_tensor_set_fn tensor_set, ds_filler **out);
DS_API void ds_filler_free(ds_filler *filler);
/* llama_model_set_tensor_data_t; ud is the filler. After an error it does nothing more. */
DS_API void ds_fill_tensor(struct ggml_tensor *tensor, void *ud);
/* The first error, and the name of its tensor in name[0 .. capacity), always ended by a zero. */
DS_API int32_t ds_filler_error(const ds_filler *filler, char *name, size_t capacity);
DS_API uint64_t ds_filler_count(const ds_filler *filler); /* tensors filled */

/* ---- tap: capture and inject hidden states during llama_decode --------------------------------------------- */

typedef struct ds_tap ds_tap;

DS_API int32_t ds_tap_new(ds_get_name_fn get_name, ds_nbytes_fn nbytes, ds_tensor_get_fn tensor_get,
                          ds_tensor_set_fn tensor_set, ds_tap **out);
DS_API void ds_tap_free(ds_tap *tap);
/* Which tensors, by exact name; NULL for none. DS_E_ARG if a name is empty, too long, or both are the same. */
DS_API int32_t ds_tap_set_names(ds_tap *tap, const char *capture, const char *inject);
/* Before each decode. target NULL: capture nothing and run the whole graph. source NULL: inject nothing. */
DS_API int32_t ds_tap_begin(ds_tap *tap, void *target, uint64_t capacity, const void *source, uint64_t size);
/* ggml_backend_sched_eval_callback; ud is the tap. */
DS_API bool ds_tap_callback(struct ggml_tensor *tensor, bool ask, void *ud);
/* Call pause(data) at every layer of a decode, on the thread that decodes; NULL for none. Independent of begin. */
typedef void (*ds_pause_fn)(void *data);
DS_API int32_t ds_tap_set_pause(ds_tap *tap, ds_pause_fn pause, void *data);
DS_API uint64_t ds_tap_captured(const ds_tap *tap); /* bytes since begin */
DS_API uint64_t ds_tap_injected(const ds_tap *tap); /* bytes since begin */
DS_API int32_t ds_tap_error(const ds_tap *tap);     /* DS_OK or DS_E_OVERFLOW */

/* ---- activation codecs and checksum ------------------------------------------------------------------------ */

enum ds_dtype { DS_F32 = 1, DS_F16 = 2, DS_Q8 = 3 };

/* Bytes of rows × cols values on the wire, or a negative status. Layouts: codec.cpp. */
DS_API int64_t ds_encoded_size(int32_t dtype, int64_t rows, int64_t cols);
/* rows × cols f32 → wire bytes written. capacity in bytes, must suffice. */
DS_API int64_t ds_encode(int32_t dtype, const float *x, int64_t rows, int64_t cols, void *out, uint64_t capacity);
/* size bytes (exactly ds_encoded_size) → rows × cols f32. count is the room in out, in floats. */
DS_API int32_t ds_decode(int32_t dtype, const void *data, uint64_t size, int64_t rows, int64_t cols, float *out,
                         uint64_t count);
/* CRC-32C (Castagnoli). seed is 0, or the value of the bytes before. */
DS_API uint32_t ds_crc32c(uint32_t seed, const void *data, uint64_t n);
/* The same by table, whatever the CPU: for tests of the fast path. */
DS_API uint32_t ds_crc32c_portable(uint32_t seed, const void *data, uint64_t n);
/* Likewise: ds_encode and ds_decode without the CPU's half conversion. Process-wide; not for production. */
DS_API void ds_force_portable_half(bool on);

/* ---- rows and logits --------------------------------------------------------------------------------------- */

/* out[i] = scale · row(ids[i]). Rows lie row_bytes apart from base; to_float NULL means they are f32. */
DS_API int32_t ds_embed_rows(ds_to_float_fn to_float, const void *base, int64_t n_rows, int64_t row_bytes,
                             int64_t n_embd, const int32_t *ids, int64_t n, float scale, float *out);
/* Index of the first maximum, as llama.cpp's greedy sampler; or a negative status. */
DS_API int32_t ds_argmax(const float *logits, int32_t n);
#define DS_MAX_TOP 20 /* OpenAI's bound on top_logprobs */
/* log-softmax of `chosen` and of the k largest, best first, ties to the lower id. Writes min(k, n) and returns it. */
DS_API int32_t ds_top_logprobs(const float *logits, int32_t n, int32_t chosen, int32_t k, int32_t *out_ids,
                               float *out_logprobs, float *out_chosen);

/* ---- stage: frames through llama.cpp ----------------------------------------------------------------------- */

/* struct llama_batch of llama.h, passed by value. */
typedef struct ds_llama_batch {
    int32_t n_tokens;
    int32_t *token;
    float *embd;
    int32_t *pos;
    int32_t *n_seq_id;
    int32_t **seq_id;
    int8_t *logits;
} ds_llama_batch;

/* A llama_context with its memory and tap (NULL on a last stage that injects nothing and never pauses). */
typedef struct ds_stage_context {
    void *context;
    void *memory;
    ds_tap *tap;
    int32_t capacity; /* rows of a decode */
    int32_t outputs;  /* rows of a decode whose logits are computed, on the last stage */
} ds_stage_context;

typedef struct ds_stage_config {
    ds_stage_context steps;  /* a sequence for each slot */
    ds_stage_context prompt; /* one sequence: the prompt that is being read; or the same as steps, where llama.cpp cannot
                              * move cells from one to the other: then nothing goes before a prompt */
    const ds_stage_context *own; /* NULL, or a context for each slot, with one sequence, instead of `steps`, whose
                                  * capacity and outputs then bound a frame */
    int32_t (*decode)(void *context, ds_llama_batch batch);     /* llama_decode */
    float *(*logits)(void *context, int32_t row);               /* llama_get_logits_ith */
    bool (*seq_rm)(void *memory, int32_t seq, int32_t from, int32_t to); /* llama_memory_seq_rm */
    size_t (*state_size)(void *context, int32_t seq, uint32_t flags); /* llama_state_seq_get_size_ext */
    size_t (*state_get)(void *context, uint8_t *to, size_t size, int32_t seq, uint32_t flags); /* …_get_data_ext */
    size_t (*state_set)(void *context, const uint8_t *from, size_t size, int32_t seq, uint32_t flags); /* …_set_data_ext */
    size_t (*whole_size)(void *context);                           /* llama_state_get_size */
    size_t (*whole_get)(void *context, uint8_t *to, size_t size);  /* llama_state_get_data */
    int32_t (*sample)(void *chain, void *context, int32_t row); /* llama_sampler_sample */
    void *(*chain_remove)(void *chain, int32_t index);          /* llama_sampler_chain_remove */
    void (*chain_add)(void *chain, void *sampler);              /* llama_sampler_chain_add */
    void *(*init_dist)(uint32_t seed);                          /* llama_sampler_init_dist */
    void (*sampler_free)(void *sampler);                        /* llama_sampler_free */
    ds_to_float_fn to_float;                                    /* first stage: as ds_embed_rows */
    const void *rows;
    int64_t n_rows, row_bytes;
    float scale;
    int32_t n_embd, n_vocab;
    int32_t slots;
    int32_t planes; /* positions per row */
    int32_t window; /* positions that layers with a window look back on (llama_model_n_swa); 0: there are none */
    bool first, last, injects, token_input;
} ds_stage_config;

typedef struct ds_stage ds_stage;

/* batch_bytes: sizeof(struct llama_batch) as the installed binding has it; DS_E_ARG if it is not ours. */
DS_API int32_t ds_stage_new(const ds_stage_config *config, size_t batch_bytes, ds_stage **out);
DS_API void ds_stage_free(ds_stage *stage);
/* How it goes on: wire, the ds_dtype of what is sent; batched: rows of several slots in one llama_decode. */
DS_API int32_t ds_stage_tune(ds_stage *stage, int32_t wire, bool batched);
/* n rows of one slot from `position` on, as one decode; what the slot held from there on is forgotten. out n × n_embd,
 * not used on the last stage. prompt: on the prompt's context; it ends with a row that is wanted. DS_E_NAME: no tensor
 * had the tap's name. */
DS_API int32_t ds_stage_step(ds_stage *stage, bool prompt, int32_t n, const float *rows, int32_t position, int32_t slot,
                             const uint8_t *wants, float *out);
DS_API int32_t ds_stage_error(const ds_stage *stage); /* what llama_decode answered when it failed last */
/* Let target hold what source holds before position, and nothing else. */
DS_API int32_t ds_stage_copy(ds_stage *stage, int32_t source, int32_t target, int32_t position);
/* What a slot holds before position, for a process with the same slice: its bytes, fetched by ds_stage_given. What it held
 * from there on is forgotten. DS_E_GAP: it cannot be cut there; DS_E_UNSUPPORTED: this model's cells do not move. */
DS_API int64_t ds_stage_give(ds_stage *stage, int32_t slot, int32_t position);
DS_API int32_t ds_stage_given(ds_stage *stage, void *out, size_t size);
/* Let a slot hold what another process gave, and nothing else; nothing at all if that fails. floor: what it could be cut
 * to there. With position 0 it is emptied. */
DS_API int32_t ds_stage_take(ds_stage *stage, int32_t slot, int32_t position, int32_t floor, const void *data,
                             size_t size);
DS_API int32_t ds_stage_clear(ds_stage *stage); /* every slot is empty */
/* mode 0: none, 1: greedy, 2: a chain. dist: index of the drawing sampler in the chain, or -1. general: frames with
 * rows of this slot are not for ds_stage_run. */
DS_API int32_t ds_stage_sampler(ds_stage *stage, int32_t slot, int32_t mode, void *chain, int32_t dist, uint64_t seed,
                                bool general);
/* The token drawn behind row `row` of the last step; or a negative status, DS_E_RANGE if the slot has no sampler.
 * guess: the row's own token if it was guessed, else -1: DS_E_GUESS unless it is what was drawn for its position. */
DS_API int32_t ds_stage_draw(ds_stage *stage, bool prompt, int32_t row, int32_t slot, int32_t position, int32_t guess);
/* A whole frame of steps; bytes written to out. DS_E_UNSUPPORTED: nothing was done, take the general way. feed: bytes,
 * behind those, of the frame with which the first stage goes on; 0: none. */
DS_API int64_t ds_stage_run(ds_stage *stage, const void *frame, size_t size, uint32_t wait_us, void *out, size_t room,
                            uint64_t *feed);
/* A slot draws nothing any more, until its sampler is set. */
DS_API int32_t ds_stage_halt(ds_stage *stage, int32_t slot);
/* Tokens behind which no row goes on by itself. DS_E_RANGE if one is not in the vocabulary. */
DS_API int32_t ds_stage_ends(ds_stage *stage, const int32_t *tokens, int32_t n);
/* How many positions a slot holds; floor: it can be cut to none, or to so many at least. While nothing runs. */
DS_API int32_t ds_stage_held(const ds_stage *stage, int32_t slot, int32_t *floor);
/* Microseconds spent computing since it was made. */
DS_API uint64_t ds_stage_busy_us(const ds_stage *stage);
/* Seed of llama.cpp's generator for a position; never 0xFFFFFFFF. */
DS_API uint32_t ds_draw_seed(uint64_t seed, int32_t position);

/* ---- probe ------------------------------------------------------------------------------------------------- */

#define DS_PROBE_MAX_THREADS 256           /* no machine we lend has more; a typing error does */
#define DS_PROBE_MAX_BYTES (16ull << 30)   /* a probe must not push a machine into swap */
#define DS_PROBE_MAX_SECONDS 10.0
/* Read bandwidth in GB/s (1e9 bytes) of `threads` threads over `bytes` in all, for about `seconds`; negative: status. */
DS_API double ds_memory_bandwidth(int32_t threads, uint64_t bytes, double seconds);

#ifdef __cplusplus
}
#endif
#endif
