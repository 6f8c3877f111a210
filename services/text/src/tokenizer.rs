//! A tokenizer: the model's files, read once; text to ids; the tables that decoding and chat need.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use tokenizers::models::ModelWrapper;
use tokenizers::tokenizer::normalizer::Range as TextRange;
use tokenizers::tokenizer::pre_tokenizer::OffsetType;
use tokenizers::{
    Encoding, Model, NormalizedString, Normalizer, PreTokenizedString, PreTokenizer, Token,
};

use crate::config::{AddedEnds, Config};
use crate::decode::DecodeTable;
use crate::error::{Error, Result};
use crate::special::{is_control, Added, Matcher};
use crate::template::Templates;

type Split = (NormalizedString, Option<Vec<Token>>);

/// Which added tokens a text may be read as.
#[derive(Clone, Copy)]
pub enum Reading<'a> {
    /// Those that are not special: special strings are ordinary text.
    Ordinary,
    /// All.
    Special,
    /// All, but control tokens only where none of these ranges is touched. Sorted, apart.
    Guarded(&'a [Range<usize>]),
}

pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    pub templates: Templates,
    pub table: Arc<DecodeTable>,
    /// Matched in the text as it comes, and in the normalized text.
    plain_matcher: Matcher,
    normalized_matcher: Matcher,
    /// All control tokens by their own text, and those that are found in normalized text.
    control_matcher: Matcher,
    normalized_control_matcher: Matcher,
    /// Ids that must not come out of ordinary text (never the unknown token's).
    special_ids: HashSet<u32>,
    control_ids: HashSet<u32>,
    /// Set where tokenizer_config.json decides what is added, not tokenizer.json.
    adds: Option<AddedEnds>,
    pub bos_id: Option<i32>,
    pub eos_id: Option<i32>,
    pub vocab_size: i32,
}

impl Tokenizer {
    /// The three files' texts; the last two may be empty.
    pub fn new(tokenizer: &str, tokenizer_config: &str, chat_template: &str) -> Result<Self> {
        let config = Config::parse(tokenizer_config, chat_template)?;
        let templates = Templates::new(&config)?;
        let inner = tokenizers::Tokenizer::from_bytes(tokenizer)
            .map_err(|e| Error::invalid(format!("tokenizer.json does not parse: {e}")))?;
        let added = added_tokens(&inner, &templates);
        let id_count = id_count(&inner);
        let token_id = |text: &Option<String>| {
            text.as_ref().and_then(|t| inner.token_to_id(t)).and_then(|id| i32::try_from(id).ok())
        };
        let (bos_id, eos_id) = (token_id(&config.bos_token), token_id(&config.eos_token));
        let unknown = unknown_token(inner.get_model()).and_then(|t| inner.token_to_id(&t));
        let ids_where = |wanted: fn(&Added) -> bool| -> HashSet<u32> {
            let ids = added.iter().filter(|a| wanted(a)).map(|a| a.id);
            ids.filter(|id| Some(*id) != unknown).collect()
        };
        let (special_ids, control_ids) = (ids_where(|a| a.token.special), ids_where(|a| a.control));
        let matcher = |wanted: fn(&Added) -> bool, pattern: &dyn Fn(&Added) -> Result<String>| {
            let tokens: Vec<Added> = added.iter().filter(|a| wanted(a)).cloned().collect();
            let patterns = tokens.iter().map(pattern).collect::<Result<Vec<_>>>()?;
            Matcher::new(tokens, &patterns)
        };
        let own_text = |added: &Added| Ok(added.token.content.clone());
        let plain_matcher = matcher(|a| !a.token.normalized, &own_text)?;
        let control_matcher = matcher(|a| a.control, &own_text)?;
        let normal_text = |added: &Added| normalized(&inner, &added.token.content);
        let normalized_matcher = matcher(|a| a.token.normalized, &normal_text)?;
        let normalized_control_matcher =
            matcher(|a| a.token.normalized && a.control, &normal_text)?;
        let specials: HashMap<u32, bool> = added.iter().map(|a| (a.id, a.token.special)).collect();
        let decoder = serde_json::to_value(inner.get_decoder())
            .map_err(|e| Error::invalid(format!("tokenizer.json: decoder: {e}")))?;
        let table = DecodeTable::new(&decoder, id_count, |id| {
            Some((inner.id_to_token(id)?, specials.get(&id).copied().unwrap_or(false)))
        })?;
        Ok(Self {
            adds: config.adds,
            vocab_size: i32::try_from(id_count)
                .map_err(|_| Error::invalid("tokenizer.json: token ids do not fit 31 bits"))?,
            table: Arc::new(table),
            templates,
            plain_matcher,
            normalized_matcher,
            control_matcher,
            normalized_control_matcher,
            special_ids,
            control_ids,
            bos_id,
            eos_id,
            inner,
        })
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// Where `text` holds what could be read as a control token, in no order: (its id, where).
    pub fn control_spans(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        let mut spans = self.control_matcher.spans(text);
        if self.normalized_control_matcher.is_empty() {
            return Ok(spans);
        }
        let mut normal = NormalizedString::from(text);
        if let Some(normalizer) = self.inner.get_normalizer() {
            normalizer.normalize(&mut normal).map_err(|e| {
                Error::internal(format!("tokenizer.json: its normalizer fails: {e}"))
            })?;
        }
        for (id, range) in self.normalized_control_matcher.spans(normal.get()) {
            spans.extend(normal.convert_offsets(TextRange::Normalized(range)).map(|at| (id, at)));
        }
        Ok(spans)
    }

    /// How many bytes at the beginning of `text` could end a control token, and at its end begin
    /// one.
    pub fn partial_controls(&self, text: &str) -> (usize, usize) {
        self.control_matcher.partial_ends(text)
    }

    pub fn token_id(&self, token: &str) -> Option<i32> {
        self.inner.token_to_id(token).and_then(|id| i32::try_from(id).ok())
    }

    /// The ids of `text`; with those that the model wants at its ends where `add_ends`.
    pub fn encode(&self, text: &str, reading: Reading, add_ends: bool) -> Result<Vec<i32>> {
        let encoding = self.encode_text(text, reading).map_err(|e| {
            Error::internal(format!(
                "the tokenizer fails on this text of {} bytes: {e}",
                text.len()
            ))
        })?;
        if !add_ends {
            return Ok(to_ids(&encoding));
        }
        let own_count = encoding.len();
        let begins_with_bos = encoding.get_ids().first().copied();
        let mut ids = self.with_ends(encoding)?;
        // A text that begins with BOS by itself does not get a second one.
        let bos = begins_with_bos.and_then(|id| i32::try_from(id).ok());
        if bos.is_some() && bos == self.bos_id && ids.len() > own_count && ids[..2] == [ids[0]; 2] {
            ids.remove(0);
        }
        Ok(ids)
    }

    fn with_ends(&self, encoding: Encoding) -> Result<Vec<i32>> {
        let Some(adds) = self.adds else {
            let processed = self.inner.post_process(encoding, None, true);
            return processed.map(|e| to_ids(&e)).map_err(|e| {
                Error::internal(format!("tokenizer.json: its post-processor fails: {e}"))
            });
        };
        let begin = self.bos_id.filter(|_| adds.bos);
        let end = self.eos_id.filter(|_| adds.eos);
        Ok(begin.into_iter().chain(to_ids(&encoding)).chain(end).collect())
    }

    /// The crate's own order of work (added tokens in the raw text, normalizer, added tokens in
    /// the normalized text, pre-tokenizer, model), with our say in which added tokens count.
    fn encode_text(&self, text: &str, reading: Reading) -> tokenizers::Result<Encoding> {
        let mut splits = PreTokenizedString::from(text);
        splits.split(|_, part| split_at(&part, &self.plain_matcher, &reading))?;
        if let Some(normalizer) = self.inner.get_normalizer() {
            splits.normalize(|part| normalizer.normalize(part))?;
        }
        splits.split(|_, part| split_at(&part, &self.normalized_matcher, &reading))?;
        if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut splits)?;
        }
        let none = HashSet::new();
        let forbidden = match reading {
            Reading::Ordinary => &self.special_ids,
            Reading::Special => &none,
            Reading::Guarded(_) => &self.control_ids,
        };
        splits.tokenize(|part| self.tokenize(part.get(), forbidden))?;
        splits.into_encoding(None, 0, OffsetType::None)
    }

    /// A vocabulary may hold a special token's text as an ordinary entry, which the model then
    /// finds by itself: such a word is taken apart.
    fn tokenize(&self, word: &str, forbidden: &HashSet<u32>) -> tokenizers::Result<Vec<Token>> {
        let model = self.inner.get_model();
        let clean = |tokens: &[Token]| tokens.iter().all(|token| !forbidden.contains(&token.id));
        let tokens = model.tokenize(word)?;
        if clean(&tokens) {
            return Ok(tokens);
        }
        let mut tokens = Vec::new();
        let mut buffer = [0; 4];
        for character in word.chars() {
            tokens.extend(model.tokenize(character.encode_utf8(&mut buffer))?);
        }
        if clean(&tokens) {
            return Ok(tokens);
        }
        Err("a character of it can only be written with a special token".into())
    }
}

/// The parts of `part` between the added tokens of `matcher`, and those tokens.
fn split_at(
    part: &NormalizedString,
    matcher: &Matcher,
    reading: &Reading,
) -> tokenizers::Result<Vec<Split>> {
    let text = part.get();
    let found = matcher.find(text, |added, start, end| match reading {
        Reading::Special => true,
        Reading::Ordinary => !added.token.special,
        Reading::Guarded(_) if !added.control => true,
        Reading::Guarded(guarded) => {
            let shift = part.offsets_original().0;
            part.convert_offsets(TextRange::Normalized(start..end))
                .is_some_and(|at| !touches(guarded, at.start + shift..at.end + shift))
        }
    });
    let slice = |start: usize, end: usize| {
        part.slice(TextRange::Normalized(start..end)).ok_or("a token splits a character")
    };
    let mut splits = Vec::with_capacity(found.len() * 2 + 1);
    let mut past = 0;
    for token in found {
        if past < token.start {
            splits.push((slice(past, token.start)?, None));
        }
        let own = slice(token.start, token.end)?;
        let offsets = (0, own.get().len());
        let value = Token::new(token.added.id, own.get().to_owned(), offsets);
        splits.push((own, Some(vec![value])));
        past = token.end;
    }
    if past < text.len() {
        splits.push((slice(past, text.len())?, None));
    }
    Ok(splits)
}

/// Whether `at` shares a byte with one of `ranges`, which are sorted and apart.
fn touches(ranges: &[Range<usize>], at: Range<usize>) -> bool {
    let first_after = ranges.partition_point(|range| range.end <= at.start);
    ranges.get(first_after).is_some_and(|range| range.start < at.end)
}

fn to_ids(encoding: &Encoding) -> Vec<i32> {
    // new() has seen that every id fits.
    encoding.get_ids().iter().map(|&id| i32::try_from(id).unwrap_or(i32::MAX)).collect()
}

fn added_tokens(inner: &tokenizers::Tokenizer, templates: &Templates) -> Vec<Added> {
    let sources: Vec<&str> = templates.sources.iter().map(String::as_str).collect();
    let decoder = inner.get_added_tokens_decoder();
    let mut added: Vec<Added> = decoder
        .iter()
        .filter(|(_, token)| !token.content.is_empty())
        .map(|(&id, token)| Added {
            id,
            control: is_control(token, &sources),
            token: token.clone(),
        })
        .collect();
    added.sort_by_key(|a| a.id);
    added
}

/// One more than the largest id.
fn id_count(inner: &tokenizers::Tokenizer) -> usize {
    inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1)
}

fn normalized(inner: &tokenizers::Tokenizer, text: &str) -> Result<String> {
    let mut normalized = NormalizedString::from(text);
    if let Some(normalizer) = inner.get_normalizer() {
        normalizer.normalize(&mut normalized).map_err(|e| {
            Error::invalid(format!("tokenizer.json: its normalizer fails on an added token: {e}"))
        })?;
    }
    Ok(normalized.get().to_owned())
}

fn unknown_token(model: &ModelWrapper) -> Option<String> {
    match model {
        ModelWrapper::BPE(model) => model.unk_token.clone(),
        ModelWrapper::WordPiece(model) => Some(model.unk_token.clone()),
        ModelWrapper::WordLevel(model) => Some(model.unk_token.clone()),
        ModelWrapper::Unigram(_) => Some("<unk>".to_owned()),
    }
}
