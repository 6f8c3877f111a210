//! Bytes to text as they arrive: only whole characters come out, at most three bytes are held.

/// How bytes that are not UTF-8 are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invalid {
    /// One U+FFFD for each maximal part of a character, as the Unicode standard advises and
    /// byte-level tokenizers do.
    PerPart,
    /// One U+FFFD for each byte, as sentencepiece does for its byte tokens.
    PerByte,
}

#[derive(Debug)]
pub struct Utf8Decoder {
    invalid: Invalid,
    held: [u8; 3],
    held_count: usize,
    /// Continuation bytes that the held character still needs; 0 = nothing is held.
    missing: usize,
    /// The range that the next continuation byte must lie in.
    low: u8,
    high: u8,
}

impl Utf8Decoder {
    pub fn new(invalid: Invalid) -> Self {
        Self { invalid, held: [0; 3], held_count: 0, missing: 0, low: 0x80, high: 0xbf }
    }

    pub fn push(&mut self, bytes: &[u8], out: &mut String) {
        if self.missing == 0 {
            if let Ok(text) = std::str::from_utf8(bytes) {
                out.push_str(text);
                return;
            }
        }
        for &byte in bytes {
            self.push_byte(byte, out);
        }
    }

    /// Ends the text here: an incomplete character becomes U+FFFD.
    pub fn flush(&mut self, out: &mut String) {
        let count = match self.invalid {
            Invalid::PerPart => self.held_count.min(1),
            Invalid::PerByte => self.held_count,
        };
        for _ in 0..count {
            out.push(char::REPLACEMENT_CHARACTER);
        }
        self.held_count = 0;
        self.missing = 0;
    }

    fn push_byte(&mut self, byte: u8, out: &mut String) {
        if self.missing > 0 {
            if byte < self.low || byte > self.high {
                self.flush(out);
            } else if self.missing == 1 {
                let mut whole = [0u8; 4];
                whole[..self.held_count].copy_from_slice(&self.held[..self.held_count]);
                whole[self.held_count] = byte;
                match std::str::from_utf8(&whole[..self.held_count + 1]) {
                    Ok(text) => out.push_str(text),
                    Err(_) => unreachable!("the ranges below admit well-formed characters only"),
                }
                self.held_count = 0;
                self.missing = 0;
                return;
            } else {
                self.hold(byte);
                self.missing -= 1;
                (self.low, self.high) = (0x80, 0xbf);
                return;
            }
        }
        self.start(byte, out);
    }

    /// Table 3-7 of the Unicode standard: what may follow a character's first byte.
    fn start(&mut self, byte: u8, out: &mut String) {
        let (missing, low, high) = match byte {
            0x00..=0x7f => {
                out.push(char::from(byte));
                return;
            }
            0xc2..=0xdf => (1, 0x80, 0xbf),
            0xe0 => (2, 0xa0, 0xbf),
            0xed => (2, 0x80, 0x9f),
            0xe1..=0xef => (2, 0x80, 0xbf),
            0xf0 => (3, 0x90, 0xbf),
            0xf1..=0xf3 => (3, 0x80, 0xbf),
            0xf4 => (3, 0x80, 0x8f),
            0x80..=0xc1 | 0xf5..=0xff => {
                out.push(char::REPLACEMENT_CHARACTER);
                return;
            }
        };
        (self.missing, self.low, self.high) = (missing, low, high);
        self.hold(byte);
    }

    fn hold(&mut self, byte: u8) {
        self.held[self.held_count] = byte;
        self.held_count += 1;
    }
}
