//! A conversation to token ids, so that nothing a client wrote becomes a control token.
//!
//! The template mixes its own text with the client's. To tell them apart afterwards, what could
//! become a control token in the client's strings is put between two marks before rendering; the
//! marks are taken out of what comes out, and their places are where no control token may be
//! read. The rest, and everything as one text, is then encoded as it would be without marks.
//!
//! A template may act on such a string (Qwen3 looks for `</think>` in an answer), and a mark in
//! it would change what comes out. So the text without marks is rendered too and decides: where
//! the two differ, marks are left out group by group until they agree. What tokenizer.json calls
//! special must keep its marks, or the conversation is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::template::Inputs;
use crate::tokenizer::{Reading, Tokenizer};

/// A message as it comes through the C interface; empty = none, except for the content.
pub struct Message<'a> {
    pub role: &'a str,
    pub content: &'a str,
    pub name: &'a str,
    pub tool_calls_json: &'a str,
    pub tool_call_id: &'a str,
}

pub struct Options<'a> {
    pub add_generation_prompt: bool,
    pub tools_json: &'a str,
    pub date: &'a str,
}

/// A role is a word of the template's language, not the client's: `<|` + role + `|>` is a token.
const ROLES: [&str; 7] =
    ["system", "developer", "user", "assistant", "tool", "function", "ipython"];

/// Groups of strings that are tried one by one where marks change what a template writes.
const GROUPS_MAX: usize = 32;

pub fn render(tokenizer: &Tokenizer, messages: &[Message], options: &Options) -> Result<String> {
    tokenizer.templates.render(&inputs(tokenizer, messages, options)?)
}

pub fn encode(tokenizer: &Tokenizer, messages: &[Message], options: &Options) -> Result<Vec<i32>> {
    let inputs = inputs(tokenizer, messages, options)?;
    let text = tokenizer.templates.render(&inputs)?;
    let guarded = guarded_ranges(tokenizer, &inputs, &text)?;
    tokenizer.encode(&text, Reading::Guarded(&guarded), false)
}

fn inputs(tokenizer: &Tokenizer, messages: &[Message], options: &Options) -> Result<Inputs> {
    if tokenizer.templates.is_empty() {
        return Err(Error::precondition("the model has no chat template"));
    }
    let messages = messages.iter().enumerate().map(|(i, m)| message_value(i, m));
    Ok(Inputs {
        messages: Value::Array(messages.collect::<Result<Vec<_>>>()?),
        tools: json_array("tools", options.tools_json)?,
        add_generation_prompt: options.add_generation_prompt,
        date: options.date.to_owned(),
    })
}

fn message_value(index: usize, message: &Message) -> Result<Value> {
    if !ROLES.contains(&message.role) {
        let roles = ROLES.join(", ");
        return Err(Error::invalid(format!("messages[{index}].role is not one of {roles}")));
    }
    let mut map = serde_json::Map::new();
    map.insert("role".to_owned(), message.role.into());
    map.insert("content".to_owned(), message.content.into());
    if !message.name.is_empty() {
        map.insert("name".to_owned(), message.name.into());
    }
    let mut calls = json_array(&format!("messages[{index}].tool_calls"), message.tool_calls_json)?;
    if let Value::Array(list) = &mut calls {
        list.iter_mut().for_each(parse_arguments);
        map.insert("tool_calls".to_owned(), calls);
    }
    if !message.tool_call_id.is_empty() {
        map.insert("tool_call_id".to_owned(), message.tool_call_id.into());
    }
    Ok(Value::Object(map))
}

/// Null for an empty text.
fn json_array(field: &str, json: &str) -> Result<Value> {
    if json.trim().is_empty() {
        return Ok(Value::Null);
    }
    match serde_json::from_str(json) {
        Ok(Value::Array(list)) => Ok(Value::Array(list)),
        Ok(_) => Err(Error::invalid(format!("{field} is not a JSON array"))),
        Err(e) => Err(Error::invalid(format!("{field} is not valid JSON: {e}"))),
    }
}

/// Clients send a call's arguments as JSON in a string; templates expect the object itself.
fn parse_arguments(call: &mut Value) {
    let Some(arguments) = call.pointer_mut("/function/arguments") else { return };
    let parsed = arguments.as_str().and_then(|text| serde_json::from_str::<Value>(text).ok());
    if let Some(object @ Value::Object(_)) = parsed {
        *arguments = object;
    }
}

/// What may need different marks: strings of one origin that hold one control token. Origin is
/// the role of the message, or "tools"; the token's id is None for a part of a token at a
/// string's end, which template text could complete.
type Group = (String, Option<u32>);

/// Where in `text`, which `inputs` renders to, no control token may be read.
fn guarded_ranges(tokenizer: &Tokenizer, inputs: &Inputs, text: &str) -> Result<Vec<Range<usize>>> {
    let mut used = text.to_owned();
    let mut found = BTreeMap::new();
    for_each_string(inputs, &mut |origin, string| {
        let dangers = dangers(tokenizer, string)?;
        if !dangers.is_empty() {
            found.insert((origin.to_owned(), string.to_owned()), dangers);
        }
        used.push_str(string);
        Ok(())
    })?;
    let groups: BTreeSet<Group> = found
        .iter()
        .flat_map(|((origin, _), dangers)| dangers.iter().map(|d| (origin.clone(), d.token)))
        .collect();
    if groups.is_empty() {
        return Ok(Vec::new());
    }
    let marks = Marks::unused_in(&used)?;
    let ranges_with = |groups: &BTreeSet<Group>| {
        let marked = marks.put(inputs, |origin, string| {
            let key = (origin.to_owned(), string.to_owned());
            let dangers = found.get(&key).into_iter().flatten();
            let wanted = |d: &&Danger| groups.contains(&(origin.to_owned(), d.token));
            dangers.filter(wanted).map(|d| d.range.clone()).collect()
        });
        let rendered = tokenizer.templates.render(&marked).ok()?;
        marks.take(&rendered).filter(|(without, _)| without == text).map(|(_, ranges)| ranges)
    };
    if let Some(ranges) = ranges_with(&groups) {
        return Ok(ranges);
    }
    if groups.len() > GROUPS_MAX {
        return Err(Error::invalid(
            "the messages hold too many control strings that the chat template may act on",
        ));
    }
    let must_mark = |group: &Group| group.1.is_none_or(|id| tokenizer.is_special(id));
    let (must, may): (BTreeSet<Group>, BTreeSet<Group>) = groups.into_iter().partition(must_mark);
    let mut kept = must;
    for group in may {
        if ranges_with(&BTreeSet::from([group.clone()])).is_some() {
            kept.insert(group);
        }
    }
    ranges_with(&kept).ok_or_else(|| {
        Error::invalid("a message holds a special token's text that the chat template acts on")
    })
}

/// A range of a string that could become a control token, or a part of one.
struct Danger {
    range: Range<usize>,
    token: Option<u32>,
}

/// Sorted and apart.
fn dangers(tokenizer: &Tokenizer, string: &str) -> Result<Vec<Danger>> {
    let (head, tail) = tokenizer.partial_controls(string);
    let ends = [0..head, string.len() - tail..string.len()];
    let parts = ends.into_iter().filter(|range| !range.is_empty()).map(|range| (None, range));
    let spans = tokenizer.control_spans(string)?.into_iter().map(|(id, range)| (Some(id), range));
    let mut all: Vec<(Option<u32>, Range<usize>)> = spans.chain(parts).collect();
    all.sort_by_key(|(_, range)| (range.start, range.end));
    let mut dangers: Vec<Danger> = Vec::with_capacity(all.len());
    for (token, range) in all {
        match dangers.last_mut() {
            Some(last) if range.start < last.range.end => {
                last.range.end = last.range.end.max(range.end);
                last.token = last.token.or(token);
            }
            _ => dangers.push(Danger { range, token }),
        }
    }
    Ok(dangers)
}

/// Every string of the client's, with its origin. Roles are not among them: they are checked.
fn for_each_string(inputs: &Inputs, visit: &mut dyn FnMut(&str, &str) -> Result<()>) -> Result<()> {
    let mut result = Ok(());
    map_strings(&mut inputs.clone(), &mut |origin, string| {
        if result.is_ok() {
            result = visit(origin, string);
        }
        None
    });
    result
}

/// Replaces the client's strings where `map` gives another one.
fn map_strings(inputs: &mut Inputs, map: &mut dyn FnMut(&str, &str) -> Option<String>) {
    for message in inputs.messages.as_array_mut().into_iter().flatten() {
        let role = message.get("role").and_then(Value::as_str).unwrap_or("").to_owned();
        for (key, value) in message.as_object_mut().into_iter().flatten() {
            if key != "role" {
                map_value(value, &mut |string| map(&role, string));
            }
        }
    }
    map_value(&mut inputs.tools, &mut |string| map("tools", string));
    if let Some(date) = map("date", &inputs.date) {
        inputs.date = date;
    }
}

/// Strings and keys of a JSON value. Its depth is bounded by the parser that made it.
fn map_value(value: &mut Value, map: &mut dyn FnMut(&str) -> Option<String>) {
    match value {
        Value::String(string) => {
            if let Some(mapped) = map(string) {
                *string = mapped;
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|item| map_value(item, map)),
        Value::Object(object) => {
            let entries = std::mem::take(object);
            for (key, mut item) in entries {
                map_value(&mut item, map);
                object.insert(map(&key).unwrap_or(key), item);
            }
        }
        _ => {}
    }
}

/// Two characters that stand in no text: Unicode noncharacters.
struct Marks {
    open: char,
    close: char,
}

impl Marks {
    fn unused_in(text: &str) -> Result<Self> {
        let mut unused = ('\u{fdd0}'..='\u{fdef}').filter(|&c| !text.contains(c));
        match (unused.next(), unused.next()) {
            (Some(open), Some(close)) => Ok(Self { open, close }),
            _ => Err(Error::invalid("the messages hold every Unicode noncharacter")),
        }
    }

    /// `inputs` with marks around the ranges that `ranges` names in each string.
    fn put(&self, inputs: &Inputs, ranges: impl Fn(&str, &str) -> Vec<Range<usize>>) -> Inputs {
        let mut marked = inputs.clone();
        map_strings(&mut marked, &mut |origin, string| {
            let ranges = ranges(origin, string);
            if ranges.is_empty() {
                return None;
            }
            let mut out = String::with_capacity(string.len() + ranges.len() * 6);
            let mut past = 0;
            for range in ranges {
                out.push_str(&string[past..range.start]);
                out.push(self.open);
                out.push_str(&string[range.clone()]);
                out.push(self.close);
                past = range.end;
            }
            out.push_str(&string[past..]);
            Some(out)
        });
        marked
    }

    /// `text` without marks, and the ranges of that which stood between them; None where a mark
    /// has lost its partner.
    fn take(&self, text: &str) -> Option<(String, Vec<Range<usize>>)> {
        let mut out = String::with_capacity(text.len());
        let mut ranges = Vec::new();
        let mut opened = None;
        for c in text.chars() {
            if c == self.open {
                if opened.replace(out.len()).is_some() {
                    return None;
                }
            } else if c == self.close {
                ranges.push(opened.take()?..out.len());
            } else {
                out.push(c);
            }
        }
        opened.is_none().then_some((out, ranges))
    }
}
