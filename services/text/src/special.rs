//! The added tokens of a tokenizer: where they stand in a text, and which of them steer the model.

use std::ops::Range;

use aho_corasick::{AhoCorasick, MatchKind};
use tokenizers::AddedToken;

use crate::error::{Error, Result};

/// One added token under its id.
#[derive(Clone, Debug)]
pub struct Added {
    pub id: u32,
    pub token: AddedToken,
    /// A message must not be able to produce it (see `is_control`).
    pub control: bool,
}

/// Finds added tokens in text the way the tokenizers crate does: the longest of those that begin
/// first, then its single_word, lstrip and rstrip settings.
pub struct Matcher {
    automaton: AhoCorasick,
    tokens: Vec<Added>,
}

/// A token found in a text; `start..end` is what it replaces, with the white space it swallows.
pub struct Found<'a> {
    pub added: &'a Added,
    pub start: usize,
    pub end: usize,
}

impl Matcher {
    /// `patterns[i]` is the text that stands for `tokens[i]`.
    pub fn new(tokens: Vec<Added>, patterns: &[String]) -> Result<Self> {
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(patterns)
            .map_err(|e| Error::invalid(format!("tokenizer.json: added_tokens: {e}")))?;
        Ok(Self { automaton, tokens })
    }

    /// The tokens of `text` in order. `allowed` says whether a token may stand at a place.
    pub fn find<'a>(
        &'a self,
        text: &str,
        allowed: impl Fn(&Added, usize, usize) -> bool,
    ) -> Vec<Found<'a>> {
        let mut found: Vec<Found<'a>> = Vec::new();
        let mut past = 0;
        for hit in self.automaton.find_iter(text) {
            let added = &self.tokens[hit.pattern()];
            let (core_start, core_end) = (hit.start(), hit.end());
            if core_start < past || !allowed(added, core_start, core_end) {
                continue;
            }
            let before = &text[..core_start];
            let after = &text[core_end..];
            if added.token.single_word && (ends_in_word(before) || begins_with_word(after)) {
                continue;
            }
            let mut start = core_start;
            let mut end = core_end;
            if added.token.lstrip {
                start = before.trim_end().len().max(past);
            }
            if added.token.rstrip {
                end = text.len() - after.trim_start().len();
            }
            found.push(Found { added, start, end });
            past = end;
        }
        found
    }

    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Where the tokens' texts stand in `text`, whatever their settings: (id, where).
    pub fn spans(&self, text: &str) -> Vec<(u32, Range<usize>)> {
        let hits = self.automaton.find_iter(text);
        hits.map(|hit| (self.tokens[hit.pattern()].id, hit.range())).collect()
    }

    /// How many bytes at the beginning of `text` could end a token, and at its end begin one.
    pub fn partial_ends(&self, text: &str) -> (usize, usize) {
        let (mut head, mut tail) = (0, 0);
        for added in &self.tokens {
            let token = added.token.content.as_str();
            for (at, _) in token.char_indices().skip(1) {
                if text.ends_with(&token[..at]) {
                    tail = tail.max(at);
                }
                if text.starts_with(&token[at..]) {
                    head = head.max(token.len() - at);
                }
            }
        }
        (head, tail)
    }
}

/// What a message's content must never turn into. That is every token that tokenizer.json calls
/// special; and of the others those that are written like one (`<|fim_prefix|>`) or that the
/// chat template writes itself (`<tool_call>`, `[INST]`). Runs of white space and ordinary words
/// that a vocabulary lists as added tokens are none.
pub fn is_control(token: &AddedToken, template_sources: &[&str]) -> bool {
    let text = token.content.trim();
    if token.special {
        return !text.is_empty();
    }
    let between = |open: &str, close: &str| text.starts_with(open) && text.ends_with(close);
    if between("<|", "|>") || between("<｜", "｜>") {
        return true;
    }
    let bracketed = between("<", ">") || between("[", "]");
    bracketed && template_sources.iter().any(|source| source.contains(text))
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn ends_in_word(text: &str) -> bool {
    text.chars().next_back().is_some_and(is_word)
}

fn begins_with_word(text: &str) -> bool {
    text.chars().next().is_some_and(is_word)
}
