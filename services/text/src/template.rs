//! A model's chat templates, in an environment like the one that Hugging Face gives them, but
//! without a way out: no loader, no attribute of anything but the values passed in, a bound on the
//! work done, on the output and on the depth.

use std::io;

use minijinja::value::Value;
use minijinja::{Environment, Error as JinjaError, ErrorKind, State};

use crate::config::{Config, NamedTemplate};
use crate::date::Moment;
use crate::error::{Error, Result};
use crate::python;

/// Instructions of the template engine per rendering.
const FUEL: u64 = 1_000_000;
/// Bytes of output per rendering.
pub const OUTPUT_MAX: usize = 1 << 20;
/// Depth of macros that call each other.
const RECURSION_MAX: usize = 100;

/// What a template is rendered with.
#[derive(Clone)]
pub struct Inputs {
    pub messages: serde_json::Value,
    /// Null where the caller gave none.
    pub tools: serde_json::Value,
    pub add_generation_prompt: bool,
    /// ISO 8601 for strftime_now, other text for the variable date_string; empty = none.
    pub date: String,
}

pub struct Templates {
    environment: Environment<'static>,
    variables: Vec<(String, String)>,
    /// The sources, for a look at which tokens they write.
    pub sources: Vec<String>,
}

impl Templates {
    pub fn new(config: &Config) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(RECURSION_MAX);
        environment.set_unknown_method_callback(call_method);
        environment.set_formatter(|out, _, value| {
            out.write_str(&python::str(value)?).map_err(JinjaError::from)
        });
        environment.add_filter("tojson", python::tojson);
        environment.add_filter("string", |value: &Value| python::str(value));
        environment.add_function("raise_exception", raise_exception);
        for template in &config.templates {
            add(&mut environment, template)?;
        }
        let sources = config.templates.iter().map(|t| t.source.clone()).collect();
        Ok(Self { environment, variables: config.token_variables.clone(), sources })
    }

    pub fn is_empty(&self) -> bool {
        self.sources.is_empty()
    }

    pub fn render(&self, inputs: &Inputs) -> Result<String> {
        let name = if inputs.tools.is_null() { "default" } else { "tool_use" };
        let template = self.environment.get_template(name);
        let template = template.or_else(|_| self.environment.get_template("default"));
        let template =
            template.map_err(|_| Error::precondition("the model has no chat template"))?;
        let mut writer = BoundedWriter { bytes: Vec::new(), over: false };
        let rendered = template.render_captured_to(self.variables_for(inputs), &mut writer);
        match rendered {
            Ok(_) => String::from_utf8(writer.bytes)
                .map_err(|_| Error::internal("the chat template's output is not UTF-8")),
            Err(_) if writer.over => Err(Error::invalid(format!(
                "the conversation as the chat template writes it is longer than {OUTPUT_MAX} bytes"
            ))),
            Err(error) => Err(describe(&error)),
        }
    }

    fn variables_for(&self, inputs: &Inputs) -> Value {
        let mut variables: Vec<(String, Value)> =
            self.variables.iter().map(|(name, text)| (name.clone(), Value::from(text))).collect();
        let mut set = |name: &str, value: Value| variables.push((name.to_owned(), value));
        set("messages", Value::from_serialize(&inputs.messages));
        set("tools", Value::from_serialize(&inputs.tools));
        set("documents", Value::from(()));
        set("add_generation_prompt", Value::from(inputs.add_generation_prompt));
        if !inputs.date.is_empty() {
            let date = inputs.date.clone();
            let moment = Moment::parse(&date);
            if moment.is_none() {
                set("date_string", Value::from(date.clone()));
            }
            let now = move |format: &str| moment.map_or(date.clone(), |at| at.format(format));
            set("strftime_now", Value::from_function(now));
        }
        variables.into_iter().collect()
    }
}

fn add(environment: &mut Environment<'static>, template: &NamedTemplate) -> Result<()> {
    let source = without_generation_tags(&template.source);
    environment.add_template_owned(template.name.clone(), source).map_err(|error| {
        let line = error.line().unwrap_or(0);
        let what = error.detail().unwrap_or("syntax error");
        Error::invalid(format!("chat template \"{}\", line {line}: {what}", template.name))
    })
}

/// `{% generation %}` only marks what the assistant said, for training: a block that always runs.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let begin = open + 2; // `{%}` opens a tag and closes none
        let Some(length) = rest[begin..].find("%}") else { break };
        let inside = &rest[begin..begin + length];
        let word = inside.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replaced = match word {
            "generation" => inside.replacen("generation", "if true", 1),
            "endgeneration" => inside.replacen("endgeneration", "endif", 1),
            _ => inside.to_owned(),
        };
        out.push_str(&rest[..begin]);
        out.push_str(&replaced);
        rest = &rest[begin + length..];
    }
    out.push_str(rest);
    out
}

/// The error that a template makes by itself.
#[derive(Debug)]
struct Raised(String);

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn raise_exception(message: &Value) -> std::result::Result<Value, JinjaError> {
    let raised = Raised(python::str(message)?);
    Err(JinjaError::new(ErrorKind::InvalidOperation, "raise_exception").with_source(raised))
}

/// Python's methods of strings, lists and dicts.
fn call_method(
    state: &State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> std::result::Result<Value, JinjaError> {
    // Counting or splitting at nothing never ends, or is an error in Python.
    let first_is_empty = args.first().and_then(Value::as_str).is_some_and(str::is_empty);
    if first_is_empty && matches!(method, "count" | "split") {
        let detail = format!("{method}: empty separator");
        return Err(JinjaError::new(ErrorKind::InvalidOperation, detail));
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

fn describe(error: &JinjaError) -> Error {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref::<Raised>() {
            return Error::invalid(format!("the chat template refuses: {message}"));
        }
        let out_of_fuel =
            cause.downcast_ref::<JinjaError>().is_some_and(|e| e.kind() == ErrorKind::OutOfFuel);
        if out_of_fuel {
            return Error::invalid(format!(
                "the chat template needs more than {FUEL} steps for this conversation"
            ));
        }
        source = cause.source();
    }
    let line = error.line().unwrap_or(0);
    let detail = error.detail().map_or_else(String::new, |detail| format!(": {detail}"));
    Error::invalid(format!("the chat template fails at line {line}: {}{detail}", error.kind()))
}

/// Refuses to grow beyond OUTPUT_MAX.
struct BoundedWriter {
    bytes: Vec<u8>,
    over: bool,
}

impl io::Write for BoundedWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > OUTPUT_MAX - self.bytes.len() {
            self.over = true;
            return Err(io::Error::other("output limit"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
