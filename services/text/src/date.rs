//! The date that a chat template may ask for, given by the caller: this library reads no clock.

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// A moment written as "2025-01-31" or "2025-01-31T12:34:56".
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    year: i64,
    month: usize,
    day: i64,
    hour: u32,
    minute: u32,
    second: u32,
}

impl Moment {
    pub fn parse(text: &str) -> Option<Self> {
        let (date, time) = match text.split_once(['T', ' ']) {
            Some((date, time)) => (date, time.trim_end_matches('Z')),
            None => (text, "00:00:00"),
        };
        let date: Vec<&str> = date.split('-').collect();
        let time: Vec<&str> = time.split(':').collect();
        let ([year, month, day], [hour, minute, second]) = (&date[..], &time[..]) else {
            return None;
        };
        let moment = Self {
            year: number(year, 4, 9999)?.into(),
            month: number(month, 2, 12)?.try_into().ok()?,
            day: number(day, 2, 31)?.into(),
            hour: number(hour, 2, 23)?,
            minute: number(minute, 2, 59)?,
            second: number(second, 2, 59)?,
        };
        (moment.month > 0 && moment.day > 0).then_some(moment)
    }

    /// strftime in the C locale, for the directives that name a date or a time of day. Another
    /// directive stays as it is written.
    pub fn format(&self, format: &str) -> String {
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let Some(mut directive) = chars.next() else {
                out.push('%');
                break;
            };
            let unpadded = directive == '-';
            if unpadded {
                directive = chars.next().unwrap_or('%');
            }
            let text = self.directive(directive);
            let text = if unpadded { without_padding(&text) } else { &text };
            out.push_str(text);
        }
        out
    }

    fn directive(&self, directive: char) -> String {
        let month = MONTHS[self.month - 1];
        let weekday = WEEKDAYS[self.weekday()];
        let hour_of_12 = (self.hour + 11) % 12 + 1;
        match directive {
            'Y' => format!("{:04}", self.year),
            'y' => format!("{:02}", self.year % 100),
            'm' => format!("{:02}", self.month),
            'd' => format!("{:02}", self.day),
            'e' => format!("{:2}", self.day),
            'B' => month.to_owned(),
            'b' | 'h' => month[..3].to_owned(),
            'A' => weekday.to_owned(),
            'a' => weekday[..3].to_owned(),
            'H' => format!("{:02}", self.hour),
            'I' => format!("{hour_of_12:02}"),
            'M' => format!("{:02}", self.minute),
            'S' => format!("{:02}", self.second),
            'p' => if self.hour < 12 { "AM" } else { "PM" }.to_owned(),
            'F' => self.format("%Y-%m-%d"),
            'T' => self.format("%H:%M:%S"),
            '%' => "%".to_owned(),
            other => format!("%{other}"),
        }
    }

    /// 0 = Sunday. Sakamoto's method for the Gregorian calendar.
    fn weekday(&self) -> usize {
        const SHIFT: [i64; 12] = [0, 3, 2, 5, 0, 3, 5, 1, 4, 6, 2, 4];
        let year = if self.month < 3 { self.year - 1 } else { self.year };
        let days = year + year / 4 - year / 100 + year / 400 + SHIFT[self.month - 1] + self.day;
        usize::try_from(days.rem_euclid(7)).unwrap_or(0)
    }
}

fn number(text: &str, digits: usize, max: u32) -> Option<u32> {
    let plain = text.len() == digits && text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|&value| plain && value <= max)
}

fn without_padding(text: &str) -> &str {
    let trimmed = text.trim_start_matches(['0', ' ']);
    if trimmed.is_empty() {
        &text[text.len() - 1..]
    } else {
        trimmed
    }
}
