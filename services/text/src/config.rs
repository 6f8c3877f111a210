//! The parts of tokenizer_config.json that decide how text is encoded.

use serde_json::Value;

use crate::error::{Error, Result};

/// A chat template and the name it goes by; an unnamed one is "default".
#[derive(Debug)]
pub struct NamedTemplate {
    pub name: String,
    pub source: String,
}

#[derive(Debug, Default)]
pub struct Config {
    pub bos_token: Option<String>,
    pub eos_token: Option<String>,
    pub templates: Vec<NamedTemplate>,
    /// Whether BOS and EOS are added, where the file decides that and not tokenizer.json.
    pub adds: Option<AddedEnds>,
    /// Every `*_token` of the file that is set: a template may name each.
    pub token_variables: Vec<(String, String)>,
}

#[derive(Clone, Copy, Debug)]
pub struct AddedEnds {
    pub bos: bool,
    pub eos: bool,
}

/// Classes whose `add_bos_token` and `add_eos_token` replace tokenizer.json's post-processor.
const CLASSES_THAT_ADD_ENDS: [&str; 6] = [
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "CodeLlamaTokenizer",
    "CodeLlamaTokenizerFast",
    "GemmaTokenizer",
    "GemmaTokenizerFast",
];

impl Config {
    /// `json` may be empty: then nothing is known. `chat_template` overrides the file's own.
    pub fn parse(json: &str, chat_template: &str) -> Result<Self> {
        let mut config = if json.trim().is_empty() {
            Self::default()
        } else {
            let value: Value = serde_json::from_str(json).map_err(|e| {
                Error::invalid(format!("tokenizer_config.json does not parse: {e}"))
            })?;
            Self::from_value(&value)?
        };
        if !chat_template.is_empty() {
            let source = chat_template.to_owned();
            config.templates = vec![NamedTemplate { name: "default".to_owned(), source }];
        }
        Ok(config)
    }

    fn from_value(value: &Value) -> Result<Self> {
        let Some(map) = value.as_object() else {
            return Err(Error::invalid("tokenizer_config.json is not a JSON object"));
        };
        let mut config = Self::default();
        for (key, value) in map {
            if let (true, Some(text)) = (key.ends_with("_token"), token_text(value)) {
                config.token_variables.push((key.clone(), text));
            }
        }
        config.bos_token = map.get("bos_token").and_then(token_text);
        config.eos_token = map.get("eos_token").and_then(token_text);
        config.templates = named_templates(map.get("chat_template").unwrap_or(&Value::Null))?;
        let class = map.get("tokenizer_class").and_then(Value::as_str).unwrap_or("");
        let bos = map.get("add_bos_token").and_then(Value::as_bool);
        if let (true, Some(bos)) = (CLASSES_THAT_ADD_ENDS.contains(&class), bos) {
            let eos = map.get("add_eos_token").and_then(Value::as_bool).unwrap_or(false);
            config.adds = Some(AddedEnds { bos, eos });
        }
        Ok(config)
    }
}

/// A token is written as its text or as an object that holds it.
fn token_text(value: &Value) -> Option<String> {
    let text = value.as_str().or_else(|| value.get("content").and_then(Value::as_str));
    text.map(str::to_owned)
}

/// One template, or a list of named ones.
fn named_templates(value: &Value) -> Result<Vec<NamedTemplate>> {
    let named = |name: &str, source: &str| NamedTemplate {
        name: name.to_owned(),
        source: source.to_owned(),
    };
    match value {
        Value::Null => Ok(Vec::new()),
        Value::String(source) => Ok(vec![named("default", source)]),
        Value::Array(list) => list
            .iter()
            .map(|item| {
                let name = item.get("name").and_then(Value::as_str);
                let source = item.get("template").and_then(Value::as_str);
                match (name, source) {
                    (Some(name), Some(source)) => Ok(named(name, source)),
                    _ => Err(bad_template()),
                }
            })
            .collect(),
        _ => Err(bad_template()),
    }
}

fn bad_template() -> Error {
    Error::invalid(
        "tokenizer_config.json: chat_template is neither text nor a list of {name, template}",
    )
}
