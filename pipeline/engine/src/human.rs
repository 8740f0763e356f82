//! Figures in human-readable form: three digits and a unit.

use std::time::Duration;

/// Bytes: `1.00 GiB`, `17.3 MiB`, `512 B`.
#[must_use]
pub fn bytes(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let mut amount = bytes as f64;
    let mut units = ["B", "KiB", "MiB", "GiB", "TiB"].iter();
    let mut unit = units.next().expect("not empty");
    while amount >= 999.5 {
        let Some(next) = units.next() else { break };
        amount /= 1024.0;
        unit = next;
    }
    if *unit == "B" { format!("{bytes} B") } else { format!("{} {unit}", three_digits(amount)) }
}

/// Bytes a second: `98.2 MiB/s`.
#[must_use]
pub fn rate(bytes_per_second: f64) -> String {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it saturates, and is shown")]
    let whole = bytes_per_second.max(0.0) as u64;
    format!("{}/s", bytes(whole))
}

/// A duration: `213 ms`, `12.3 s`, `4m 05s`.
#[must_use]
pub fn time(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds < 0.001 {
        format!("{} µs", time.as_micros())
    } else if seconds < 0.9995 {
        format!("{} ms", three_digits(seconds * 1000.0))
    } else if seconds < 119.5 {
        format!("{} s", three_digits(seconds))
    } else {
        let whole = time.as_secs();
        format!("{}m {:02}s", whole / 60, whole % 60)
    }
}

/// A number with separated thousands, or in millions: `262,144`, `16.8M`.
#[must_use]
pub fn count(number: u64) -> String {
    if number >= 1_000_000 {
        #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
        return format!("{}M", three_digits(number as f64 / 1e6));
    }
    exact(number)
}

/// A count with its noun: `1 round`, `262,144 rounds`.
#[must_use]
pub fn counted(number: u64, one: &str) -> String {
    format!("{} {one}{}", count(number), if number == 1 { "" } else { "s" })
}

/// Progress in percent: `99 %` until nothing is left.
#[must_use]
pub fn done(percent: f64) -> String {
    format!("{:.0} % done", percent.clamp(0.0, 100.0).floor())
}

/// Words in lines of at most `width` characters; a longer word is cut.
#[must_use]
pub fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let word: String = word.chars().take(width).collect();
        let line = lines.last_mut().expect("never empty");
        let used = line.chars().count();
        if used > 0 && used + 1 + word.chars().count() > width {
            lines.push(word);
        } else {
            if used > 0 {
                line.push(' ');
            }
            line.push_str(&word);
        }
    }
    lines
}

/// A number with separated thousands: `16,777,216`.
#[must_use]
pub fn exact(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn three_digits(amount: f64) -> String {
    let decimals = if amount < 9.995 {
        2
    } else if amount < 99.95 {
        1
    } else {
        0
    };
    format!("{amount:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_three_digits_and_a_unit() {
        let sizes = [0, 999, 1023, 1 << 20, 18_140_000, (1 << 30) - 1, 3 << 40, u64::MAX].map(bytes);
        assert_eq!(sizes, ["0 B", "999 B", "1.00 KiB", "1.00 MiB", "17.3 MiB", "1.00 GiB", "3.00 TiB", "16777216 TiB"]);
        let times = [0, 999, 213_000, 999_900, 12_345_678, 245_000_000].map(|us| time(Duration::from_micros(us)));
        assert_eq!(times, ["0 µs", "999 µs", "213 ms", "1.00 s", "12.3 s", "4m 05s"]);
        assert_eq!([0, 999, 1000, 262_144, 16_777_216].map(count), ["0", "999", "1,000", "262,144", "16.8M"]);
        assert_eq!([999, 16_777_216].map(exact), ["999", "16,777,216"]);
        assert_eq!([0, 1, 1000].map(|n| counted(n, "round")), ["0 rounds", "1 round", "1,000 rounds"]);
        assert_eq!(rate(103_000_000.0), "98.2 MiB/s");
        assert_eq!(rate(f64::NAN), "0 B/s");
        assert_eq!([0.0, 99.96, 100.0].map(done), ["0 % done", "99 % done", "100 % done"]);
        assert_eq!(wrap("a few words", 5), ["a few", "words"]);
    }
}
