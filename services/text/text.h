/* The C interface of the Rust library in this folder (src/c_api.rs). C++ code uses tokenizer.h.
 *
 * Text is UTF-8 as pointer and length, never NUL-terminated. A view is borrowed for the call.
 * Bytes and ids that come out belong to the caller, who frees them with nibble_text_bytes_free
 * and nibble_text_ids_free; so does the message of a status. Out parameters are written only
 * where the status is 0. A handle is freed once, with its own function.
 * Nothing panics, throws or ends the process through this interface.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Immutable: any number of threads may use one. */
typedef struct nibble_text_tokenizer nibble_text_tokenizer;
/* One thread at a time. Keeps what it needs of its tokenizer alive by itself. */
typedef struct nibble_text_stream nibble_text_stream;

typedef struct {
  const uint8_t* data; /* may be null where size is 0 */
  size_t size;
} nibble_text_view;

typedef struct {
  uint8_t* data;
  size_t size;
} nibble_text_bytes;

typedef struct {
  int32_t* data;
  size_t size;
} nibble_text_ids;

typedef struct {
  int32_t code;              /* 0, or a number of absl::StatusCode */
  nibble_text_bytes message; /* what, which and the limit; empty where code is 0 */
} nibble_text_status;

typedef struct {
  nibble_text_view role;
  nibble_text_view content;
  nibble_text_view name;            /* empty = none */
  nibble_text_view tool_calls_json; /* JSON array; empty = none */
  nibble_text_view tool_call_id;    /* empty = none */
} nibble_text_message;

typedef struct {
  const nibble_text_message* messages;
  size_t message_count;
  nibble_text_view tools_json; /* JSON array; empty = none */
  nibble_text_view date;       /* see ChatOptions::date_string; empty = none */
  bool add_generation_prompt;
} nibble_text_chat;

typedef struct {
  int32_t vocab_size; /* one more than the largest id */
  int32_t bos_id;     /* -1 = none */
  int32_t eos_id;     /* -1 = none */
  bool has_chat_template;
} nibble_text_facts;

/* The last two files may be empty; chat_template overrides the one in tokenizer_config.json. */
nibble_text_status nibble_text_tokenizer_create(nibble_text_view tokenizer_json,
                                                nibble_text_view tokenizer_config_json,
                                                nibble_text_view chat_template,
                                                const nibble_text_tokenizer** out);
void nibble_text_tokenizer_free(const nibble_text_tokenizer* tokenizer);
nibble_text_facts nibble_text_tokenizer_facts(const nibble_text_tokenizer* tokenizer);
/* -1 where the vocabulary does not have it. */
int32_t nibble_text_token_id(const nibble_text_tokenizer* tokenizer, nibble_text_view token);

/* Empty for an id that the vocabulary does not have. */
nibble_text_status nibble_text_token_bytes(const nibble_text_tokenizer* tokenizer, int32_t id,
                                           nibble_text_bytes* out);

nibble_text_status nibble_text_encode(const nibble_text_tokenizer* tokenizer, nibble_text_view text,
                                      bool add_special, bool parse_special, nibble_text_ids* out);
nibble_text_status nibble_text_decode(const nibble_text_tokenizer* tokenizer, const int32_t* ids,
                                      size_t id_count, bool skip_special, nibble_text_bytes* out);

nibble_text_stream* nibble_text_stream_create(const nibble_text_tokenizer* tokenizer,
                                              bool skip_special);
void nibble_text_stream_free(nibble_text_stream* stream);
/* `out` points into the stream and holds until the next call with it. After finish the stream
 * begins a new text. */
nibble_text_status nibble_text_stream_push(nibble_text_stream* stream, int32_t id,
                                           nibble_text_view* out);
nibble_text_status nibble_text_stream_finish(nibble_text_stream* stream, nibble_text_view* out);

nibble_text_status nibble_text_render_chat(const nibble_text_tokenizer* tokenizer,
                                           const nibble_text_chat* chat, nibble_text_bytes* out);
nibble_text_status nibble_text_encode_chat(const nibble_text_tokenizer* tokenizer,
                                           const nibble_text_chat* chat, nibble_text_ids* out);

void nibble_text_bytes_free(nibble_text_bytes bytes);
void nibble_text_ids_free(nibble_text_ids ids);

#ifdef __cplusplus
}
#endif
