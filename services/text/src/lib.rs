//! Tokenizers and chat templates for nibble, behind the C interface that text.h declares.
#![warn(clippy::all)]

mod c_api;
mod chat;
mod config;
mod date;
mod decode;
mod error;
mod python;
mod special;
mod template;
mod tokenizer;
mod utf8;
