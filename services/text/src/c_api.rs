//! The C interface of text.h. Pointers are checked here and nowhere else; a panic becomes INTERNAL.
//!
//! Safety, for every function here: the caller passes what text.h asks for (live handles, and
//! pointers to as many elements as it says), which is all that the unsafe blocks rely on.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, Once};

use crate::chat::{self, Message, Options};
use crate::decode::TokenStream;
use crate::error::{Error, Result};
use crate::tokenizer::{Reading, Tokenizer};

/// Borrowed bytes; null where `size` is 0.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct View {
    data: *const u8,
    size: usize,
}

/// Bytes that the caller frees.
#[repr(C)]
pub struct Bytes {
    data: *mut u8,
    size: usize,
}

/// Token ids that the caller frees.
#[repr(C)]
pub struct Ids {
    data: *mut i32,
    size: usize,
}

#[repr(C)]
pub struct Status {
    code: i32,
    message: Bytes,
}

#[repr(C)]
pub struct CMessage {
    role: View,
    content: View,
    name: View,
    tool_calls_json: View,
    tool_call_id: View,
}

#[repr(C)]
pub struct CChat {
    messages: *const CMessage,
    message_count: usize,
    tools_json: View,
    date: View,
    add_generation_prompt: bool,
}

#[repr(C)]
pub struct Facts {
    vocab_size: i32,
    /// -1 = none.
    bos_id: i32,
    eos_id: i32,
    has_chat_template: bool,
}

fn leak<T>(values: Vec<T>) -> (*mut T, usize) {
    let size = values.len();
    if size == 0 {
        return (std::ptr::null_mut(), 0);
    }
    (Box::into_raw(values.into_boxed_slice()).cast::<T>(), size)
}

fn free<T>(data: *mut T, size: usize) {
    if !data.is_null() {
        // SAFETY: `leak` made the pair from a boxed slice of this length.
        drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(data, size)) });
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        let (data, size) = leak(bytes);
        Self { data, size }
    }
}

impl From<String> for Bytes {
    fn from(text: String) -> Self {
        text.into_bytes().into()
    }
}

impl From<Vec<i32>> for Ids {
    fn from(ids: Vec<i32>) -> Self {
        let (data, size) = leak(ids);
        Self { data, size }
    }
}

/// # Safety
/// `data` points to `size` values that outlive the slice, or `size` is 0.
unsafe fn slice<'a, T>(data: *const T, size: usize) -> &'a [T] {
    if size == 0 || data.is_null() {
        &[]
    } else {
        // SAFETY: see above.
        unsafe { std::slice::from_raw_parts(data, size) }
    }
}

/// # Safety
/// As `slice`.
unsafe fn text<'a>(view: View, what: &str) -> Result<&'a str> {
    // SAFETY: see above.
    let bytes = unsafe { slice(view.data, view.size) };
    std::str::from_utf8(bytes).map_err(|e| {
        Error::invalid(format!("{what} is not valid UTF-8 at byte {}", e.valid_up_to()))
    })
}

/// Runs `work`; its error, or its panic, is the status.
fn guard(work: impl FnOnce() -> Result<()>) -> Status {
    let result = catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(Error::internal("the text library failed; see the log")));
    match result {
        Ok(()) => Status { code: 0, message: String::new().into() },
        Err(error) => Status { code: error.code as i32, message: error.message.into() },
    }
}

/// Rust's own report of a panic may quote the text at hand; this one names the place only.
fn report_panics_without_text() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        std::panic::set_hook(Box::new(|panic| {
            if let Some(place) = panic.location() {
                eprintln!("nibble text library: panic at {}:{}", place.file(), place.line());
            }
        }));
    });
}

/// # Safety
/// See the module; `out` points to one value.
#[no_mangle]
pub unsafe extern "C" fn nibble_text_tokenizer_create(
    tokenizer_json: View,
    tokenizer_config_json: View,
    chat_template: View,
    out: *mut *const Tokenizer,
) -> Status {
    report_panics_without_text();
    guard(|| {
        let tokenizer = unsafe { text(tokenizer_json, "tokenizer.json") }?;
        let config = unsafe { text(tokenizer_config_json, "tokenizer_config.json") }?;
        let template = unsafe { text(chat_template, "chat_template.jinja") }?;
        let tokenizer = Tokenizer::new(tokenizer, config, template)?;
        unsafe { out.write(Arc::into_raw(Arc::new(tokenizer))) };
        Ok(())
    })
}

/// # Safety
/// See the module.
#[no_mangle]
pub unsafe extern "C" fn nibble_text_tokenizer_free(tokenizer: *const Tokenizer) {
    if !tokenizer.is_null() {
        drop(unsafe { Arc::from_raw(tokenizer) });
    }
}

/// # Safety
/// See the module.
#[no_mangle]
pub unsafe extern "C" fn nibble_text_tokenizer_facts(tokenizer: *const Tokenizer) -> Facts {
    let tokenizer = unsafe { &*tokenizer };
    Facts {
        vocab_size: tokenizer.vocab_size,
        bos_id: tokenizer.bos_id.unwrap_or(-1),
        eos_id: tokenizer.eos_id.unwrap_or(-1),
        has_chat_template: !tokenizer.templates.is_empty(),
    }
}

/// # Safety
/// See the module.
#[no_mangle]
pub unsafe extern "C" fn nibble_text_token_id(tokenizer: *const Tokenizer, token: View) -> i32 {
    let mut id = -1;
    let status = guard(|| {
        let token = unsafe { text(token, "token") }?;
        id = unsafe { &*tokenizer }.token_id(token).unwrap_or(-1);
        Ok(())
    });
    free(status.message.data, status.message.size);
    id
}

/// # Safety
/// See the module; `out` points to one value.
#[no_mangle]
pub unsafe extern "C" fn nibble_text_token_bytes(
    tokenizer: *const Tokenizer,
    id: i32,
    out: *mut Bytes,
) -> Status {
    guard(|| {
        let bytes = unsafe { &*tokenizer }.table.token_bytes(id);
        unsafe { out.write(bytes.into()) };
        Ok(())
    })
}

/// # Safety
/// See the module; `out` points to one value.
#[no_mangle]
pub unsafe extern "C" fn nibble_text_encode(
    tokenizer: *const Tokenizer,
    input: View,
    add_special: bool,
    parse_special: bool,
    out: *mut Ids,
) -> Status {
    guard(|| {
        let input = unsafe { text(input, "text") }?;
        let reading = if parse_special { Reading::Special } else { Reading::Ordinary };
        let ids = unsafe { &*tokenizer }.encode(input, reading, add_special)?;
        unsafe { out.write(ids.into()) };
        Ok(())
    })
}

/// # Safety
/// See the module; `out` points to one value.
#[no_mangle]
pub unsafe extern "C" fn nibble_text_decode(
    tokenizer: *const Tokenizer,
    ids: *const i32,
    id_count: usize,
    skip_special: bool,
    out: *mut Bytes,
) -> Status {
    guard(|| {
        let table = unsafe { &*tokenizer }.table.clone();
        let mut stream = TokenStream::new(table, skip_special);
        let mut decoded = String::new();
        for &id in unsafe { slice(ids, id_count) } {
            decoded.push_str(stream.push(id));
        }
        decoded.push_str(stream.finish());
        unsafe { out.write(decoded.into()) };
        Ok(())
    })
}

/// # Safety
/// See the module.
#[no_mangle]
pub unsafe extern "C" fn nibble_text_stream_create(
    tokenizer: *const Tokenizer,
    skip_special: bool,
) -> *mut TokenStream {
    let table = unsafe { &*tokenizer }.table.clone();
    Box::into_raw(Box::new(TokenStream::new(table, skip_special)))
}

/// # Safety
/// See the module.
#[no_mangle]
pub unsafe extern "C" fn nibble_text_stream_free(stream: *mut TokenStream) {
    if !stream.is_null() {
        drop(unsafe { Box::from_raw(stream) });
    }
}

/// # Safety
/// See the module; `out` points to one value.
#[no_mangle]
pub unsafe extern "C" fn nibble_text_stream_push(
    stream: *mut TokenStream,
    id: i32,
    out: *mut View,
) -> Status {
    guard(|| {
        let piece = unsafe { &mut *stream }.push(id);
        unsafe { out.write(View { data: piece.as_ptr(), size: piece.len() }) };
        Ok(())
    })
}

/// # Safety
/// See the module; `out` points to one value.
#[no_mangle]
pub unsafe extern "C" fn nibble_text_stream_finish(
    stream: *mut TokenStream,
    out: *mut View,
) -> Status {
    guard(|| {
        let piece = unsafe { &mut *stream }.finish();
        unsafe { out.write(View { data: piece.as_ptr(), size: piece.len() }) };
        Ok(())
    })
}

/// # Safety
/// As `slice`, for everything that `chat` points to.
unsafe fn conversation<'a>(chat: *const CChat) -> Result<(Vec<Message<'a>>, Options<'a>)> {
    let chat = unsafe { &*chat };
    let messages = unsafe { slice(chat.messages, chat.message_count) };
    let messages = messages.iter().enumerate().map(|(i, message)| {
        let field = |view, name: &str| unsafe { text(view, &format!("messages[{i}].{name}")) };
        Ok(Message {
            role: field(message.role, "role")?,
            content: field(message.content, "content")?,
            name: field(message.name, "name")?,
            tool_calls_json: field(message.tool_calls_json, "tool_calls")?,
            tool_call_id: field(message.tool_call_id, "tool_call_id")?,
        })
    });
    let options = Options {
        add_generation_prompt: chat.add_generation_prompt,
        tools_json: unsafe { text(chat.tools_json, "tools") }?,
        date: unsafe { text(chat.date, "date") }?,
    };
    Ok((messages.collect::<Result<Vec<_>>>()?, options))
}

/// # Safety
/// See the module; `out` points to one value.
#[no_mangle]
pub unsafe extern "C" fn nibble_text_render_chat(
    tokenizer: *const Tokenizer,
    chat: *const CChat,
    out: *mut Bytes,
) -> Status {
    guard(|| {
        let (messages, options) = unsafe { conversation(chat) }?;
        let rendered = chat::render(unsafe { &*tokenizer }, &messages, &options)?;
        unsafe { out.write(rendered.into()) };
        Ok(())
    })
}

/// # Safety
/// See the module; `out` points to one value.
#[no_mangle]
pub unsafe extern "C" fn nibble_text_encode_chat(
    tokenizer: *const Tokenizer,
    chat: *const CChat,
    out: *mut Ids,
) -> Status {
    guard(|| {
        let (messages, options) = unsafe { conversation(chat) }?;
        let ids = chat::encode(unsafe { &*tokenizer }, &messages, &options)?;
        unsafe { out.write(ids.into()) };
        Ok(())
    })
}

/// # Safety
/// `bytes` came from this library and is freed once.
#[no_mangle]
pub unsafe extern "C" fn nibble_text_bytes_free(bytes: Bytes) {
    free(bytes.data, bytes.size);
}

/// # Safety
/// `ids` came from this library and is freed once.
#[no_mangle]
pub unsafe extern "C" fn nibble_text_ids_free(ids: Ids) {
    free(ids.data, ids.size);
}
