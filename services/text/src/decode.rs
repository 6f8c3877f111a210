//! Token ids to text, one id at a time. A whole decode is the same stream run to its end, so the
//! two cannot differ.
//!
//! The decoder of tokenizer.json is reduced to a plan that needs no look-ahead: what a token
//! stands for is put in a table when the tokenizer is made; what depends on the tokens before it
//! (bytes of a character, a leading space) is a few words of state.

use std::sync::Arc;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::utf8::{Invalid, Utf8Decoder};

/// What a decoder does, in the order in which it does it.
#[derive(Debug, Default)]
struct Plan {
    byte_level: bool,
    byte_fallback: bool,
    /// Replacements inside one token.
    replacements: Vec<(String, String)>,
    /// Leading characters removed from every token: (character, at most how many).
    token_strips: Vec<(char, usize)>,
    /// Leading characters removed from the whole text.
    text_strip: Option<(char, usize)>,
    /// Stands for a space, and for nothing in the first token.
    metaspace: Option<char>,
    /// Put between tokens, where the file has no decoder.
    separator: Option<char>,
}

/// What one token id stands for.
enum Piece<'a> {
    Absent,
    Byte(u8),
    Bytes(&'a [u8]),
}

const ABSENT: u8 = 1;
const BYTE: u8 = 2;
const SPECIAL: u8 = 4;

/// What every id stands for. Immutable; shared by all streams of a tokenizer.
pub struct DecodeTable {
    plan: Plan,
    bytes: Vec<u8>,
    /// `bytes[ends[id - 1]..ends[id]]` belongs to `id`.
    ends: Vec<usize>,
    flags: Vec<u8>,
}

impl DecodeTable {
    /// `decoder` is that object of tokenizer.json (null: none). `token` gives an id's text and
    /// whether it is special, for ids below `id_count`.
    pub fn new(
        decoder: &Value,
        id_count: usize,
        token: impl Fn(u32) -> Option<(String, bool)>,
    ) -> Result<Self> {
        let plan = Plan::parse(decoder)?;
        let mut table = Self {
            plan,
            bytes: Vec::with_capacity(id_count * 6),
            ends: Vec::with_capacity(id_count),
            flags: Vec::with_capacity(id_count),
        };
        let byte_of_char = byte_level_alphabet();
        for id in 0..id_count {
            let flags = match token(u32::try_from(id).unwrap_or(u32::MAX)) {
                None => ABSENT,
                Some((text, special)) => {
                    let kind = table.append(&text, &byte_of_char);
                    kind | if special { SPECIAL } else { 0 }
                }
            };
            table.flags.push(flags);
            table.ends.push(table.bytes.len());
        }
        Ok(table)
    }

    /// Appends what `text` stands for and says of which kind it is.
    fn append(&mut self, text: &str, byte_of_char: &[Option<u8>]) -> u8 {
        if self.plan.byte_level {
            let mapped = text.chars().map(|c| byte_of_char.get(c as usize).copied().flatten());
            match mapped.collect::<Option<Vec<u8>>>() {
                Some(bytes) => self.bytes.extend(bytes),
                None => self.bytes.extend(text.as_bytes()),
            }
            return 0;
        }
        if let (true, Some(byte)) = (self.plan.byte_fallback, byte_token(text)) {
            self.bytes.push(byte);
            return BYTE;
        }
        let mut text = text.to_owned();
        for (from, to) in &self.plan.replacements {
            text = text.replace(from, to);
        }
        for &(strip, count) in &self.plan.token_strips {
            text = strip_start(&text, strip, count).0.to_owned();
        }
        self.bytes.extend(text.as_bytes());
        0
    }

    /// What `id` adds in the middle of a text, which may be a part of a character.
    pub fn token_bytes(&self, id: i32) -> Vec<u8> {
        let bytes = match self.piece(id, false) {
            Piece::Absent => return Vec::new(),
            Piece::Byte(byte) => return vec![byte],
            Piece::Bytes(bytes) => bytes,
        };
        match (self.plan.metaspace, std::str::from_utf8(bytes)) {
            (Some(mark), Ok(text)) => text.replace(mark, " ").into_bytes(),
            _ => bytes.to_vec(),
        }
    }

    fn piece(&self, id: i32, skip_special: bool) -> Piece<'_> {
        let Some((index, &flags)) =
            usize::try_from(id).ok().and_then(|index| Some((index, self.flags.get(index)?)))
        else {
            return Piece::Absent;
        };
        if flags & ABSENT != 0 || (skip_special && flags & SPECIAL != 0) {
            return Piece::Absent;
        }
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        let bytes = &self.bytes[start..self.ends[index]];
        if flags & BYTE != 0 {
            Piece::Byte(bytes[0])
        } else {
            Piece::Bytes(bytes)
        }
    }
}

/// The text of a sequence of ids, as it grows. Each push costs time in its own token only.
pub struct TokenStream {
    table: Arc<DecodeTable>,
    skip_special: bool,
    characters: Utf8Decoder,
    strip_left: usize,
    at_first_token: bool,
    /// The text of the push under way, kept to reuse its memory.
    out: String,
}

impl TokenStream {
    pub fn new(table: Arc<DecodeTable>, skip_special: bool) -> Self {
        let invalid = if table.plan.byte_level { Invalid::PerPart } else { Invalid::PerByte };
        let strip_left = table.plan.text_strip.map_or(0, |(_, count)| count);
        let characters = Utf8Decoder::new(invalid);
        let at_first_token = true;
        Self { table, skip_special, characters, strip_left, at_first_token, out: String::new() }
    }

    /// The characters that `id` completes. An id that the vocabulary does not have adds nothing.
    pub fn push(&mut self, id: i32) -> &str {
        self.out.clear();
        self.append(id);
        self.take_leading();
        &self.out
    }

    /// What is still held back; the stream begins anew after it.
    pub fn finish(&mut self) -> &str {
        self.out.clear();
        self.characters.flush(&mut self.out);
        self.take_leading();
        self.strip_left = self.table.plan.text_strip.map_or(0, |(_, count)| count);
        self.at_first_token = true;
        &self.out
    }

    fn append(&mut self, id: i32) {
        let plan = &self.table.plan;
        match self.table.piece(id, self.skip_special) {
            Piece::Absent => return,
            Piece::Byte(byte) => self.characters.push(&[byte], &mut self.out),
            Piece::Bytes(bytes) if plan.byte_level => self.characters.push(bytes, &mut self.out),
            Piece::Bytes(bytes) => {
                self.characters.flush(&mut self.out);
                if let (Some(separator), false) = (plan.separator, self.at_first_token) {
                    self.out.push(separator);
                }
                let text = std::str::from_utf8(bytes).unwrap_or_default();
                match plan.metaspace {
                    None => self.out.push_str(text),
                    Some(mark) if self.at_first_token => {
                        self.out.extend(text.chars().filter(|c| *c != mark))
                    }
                    Some(mark) => {
                        self.out.extend(text.chars().map(|c| if c == mark { ' ' } else { c }))
                    }
                }
            }
        }
        self.at_first_token = false;
    }

    /// Removes from the very beginning of the text what the decoder strips there.
    fn take_leading(&mut self) {
        let Some((strip, _)) = self.table.plan.text_strip else { return };
        if self.strip_left == 0 || self.out.is_empty() {
            return;
        }
        let (rest, removed) = strip_start(&self.out, strip, self.strip_left);
        let more_may_follow = rest.is_empty();
        let removed_bytes = self.out.len() - rest.len();
        self.out.drain(..removed_bytes);
        self.strip_left = if more_may_follow { self.strip_left - removed } else { 0 };
    }
}

impl Plan {
    fn parse(decoder: &Value) -> Result<Self> {
        let mut plan = Self::default();
        if decoder.is_null() {
            plan.separator = Some(' ');
            return Ok(plan);
        }
        let mut steps = Vec::new();
        flatten(decoder, &mut steps);
        let mut fused = false;
        for (i, step) in steps.iter().enumerate() {
            let kind = step.get("type").and_then(Value::as_str).unwrap_or("");
            match kind {
                "ByteLevel" if steps.len() == 1 => plan.byte_level = true,
                "Metaspace" if steps.len() == 1 => plan.set_metaspace(step)?,
                "ByteFallback" if !fused => plan.byte_fallback = true,
                "Replace" if !fused => plan.replacements.push(replacement(step)?),
                "Fuse" => fused = true,
                "Strip" => {
                    let strip = leading_strip(step)?;
                    if !fused {
                        plan.token_strips.push(strip);
                    } else if plan.text_strip.replace(strip).is_some() {
                        return Err(unsupported("more than one Strip after Fuse"));
                    }
                }
                _ => return Err(unsupported(&format!("step {i}, type \"{kind}\", at that place"))),
            }
        }
        Ok(plan)
    }

    fn set_metaspace(&mut self, step: &Value) -> Result<()> {
        let mark = text_of(step, "replacement").and_then(single_char);
        let mark = mark.ok_or_else(|| unsupported("Metaspace without a replacement character"))?;
        let scheme = text_of(step, "prepend_scheme").unwrap_or("always");
        let prefixed = step.get("add_prefix_space").and_then(Value::as_bool).unwrap_or(true);
        if scheme == "never" || !prefixed {
            self.replacements.push((mark.to_string(), " ".to_owned()));
        } else {
            self.metaspace = Some(mark);
        }
        Ok(())
    }
}

fn flatten<'a>(decoder: &'a Value, steps: &mut Vec<&'a Value>) {
    match decoder.get("decoders").and_then(Value::as_array) {
        Some(list) => list.iter().for_each(|step| flatten(step, steps)),
        None => steps.push(decoder),
    }
}

fn unsupported(what: &str) -> Error {
    Error::invalid(format!("tokenizer.json: its decoder is not supported ({what})"))
}

fn text_of<'a>(step: &'a Value, key: &str) -> Option<&'a str> {
    step.get(key).and_then(Value::as_str)
}

fn single_char(text: &str) -> Option<char> {
    let mut chars = text.chars();
    chars.next().filter(|_| chars.next().is_none())
}

fn replacement(step: &Value) -> Result<(String, String)> {
    let from = step.get("pattern").and_then(|pattern| text_of(pattern, "String"));
    match (from, text_of(step, "content")) {
        (Some(from), Some(to)) if !from.is_empty() => Ok((from.to_owned(), to.to_owned())),
        _ => Err(unsupported("Replace whose pattern is not a string")),
    }
}

fn leading_strip(step: &Value) -> Result<(char, usize)> {
    let count = |key| step.get(key).and_then(Value::as_u64).unwrap_or(0);
    let start = usize::try_from(count("start")).unwrap_or(usize::MAX);
    match text_of(step, "content").and_then(single_char) {
        Some(character) if count("stop") == 0 => Ok((character, start)),
        _ => Err(unsupported("Strip at the end of the text")),
    }
}

/// `text` without at most `count` leading `strip`s, and how many there were.
fn strip_start(text: &str, strip: char, count: usize) -> (&str, usize) {
    let mut rest = text;
    let mut removed = 0;
    while removed < count {
        let Some(shorter) = rest.strip_prefix(strip) else { break };
        rest = shorter;
        removed += 1;
    }
    (rest, removed)
}

/// The byte that a token such as "<0x0A>" stands for.
fn byte_token(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

/// GPT-2's printable stand-ins: index = the character, value = the byte.
fn byte_level_alphabet() -> Vec<Option<u8>> {
    let mut byte_of_char = vec![None; 0x144];
    let mut next = 0x100;
    for byte in 0..=255u8 {
        let stands_for_itself = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let character = if stands_for_itself {
            usize::from(byte)
        } else {
            next += 1;
            next - 1
        };
        byte_of_char[character] = Some(byte);
    }
    byte_of_char
}
