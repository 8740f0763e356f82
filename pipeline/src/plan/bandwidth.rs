//! Rates as those who run networks write them: in bits, `10Gbit/s`, beside the bytes of the configuration, `1 GiB/s`.

use std::fmt;
use std::str::FromStr;

use crate::config::values;

/// Units of a thousand, in bits a second.
const UNITS: [(&str, f64); 5] = [("Tbit/s", 1e12), ("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3), ("bit/s", 1.0)];

/// What a link carries.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Bandwidth {
    /// Bytes a second; more than 0.
    pub bytes_per_second: f64,
}

impl Bandwidth {
    /// The next rate that is written with so many digits, this one or a larger.
    #[must_use]
    pub fn rounded_up(self, digits: i32) -> Self {
        let bits = self.bytes_per_second * 8.0;
        let unit = 10_f64.powf(bits.log10().floor() - f64::from(digits - 1));
        Self { bytes_per_second: (bits / unit - 1e-9).ceil() * unit / 8.0 }
    }
}

impl fmt::Display for Bandwidth {
    /// In bits, three digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = self.bytes_per_second * 8.0;
        let (name, unit) = UNITS.into_iter().find(|&(_, unit)| bits >= unit * 0.9995).unwrap_or(UNITS[4]);
        let amount = bits / unit;
        let decimals = if amount < 9.995 { 2 } else { usize::from(amount < 99.95) };
        let text = format!("{amount:.decimals$}");
        let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
        write!(f, "{text} {name}")
    }
}

impl FromStr for Bandwidth {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let refused =
            || format!("{text:?} is no bandwidth; write 10Gbit/s or 100 Mbit/s in bits, 1 GiB/s or 120 MB/s in bytes");
        let in_bits = UNITS.iter().find_map(|(name, unit)| {
            let (amount, ending) = text.split_at_checked(text.len().checked_sub(name.len())?)?;
            ending.eq_ignore_ascii_case(name).then_some((amount, unit))
        });
        let bytes_per_second = match in_bits {
            Some((amount, unit)) => amount.trim().parse::<f64>().map_err(|_| refused())? * unit / 8.0,
            None => match text.parse::<values::Bandwidth>() {
                Ok(values::Bandwidth(Some(bytes))) => bytes as f64,
                _ => return Err(refused()),
            },
        };
        let fits = bytes_per_second.is_finite() && (1.0..1e15).contains(&bytes_per_second);
        if fits { Ok(Self { bytes_per_second }) } else { Err(refused()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(text: &str) -> f64 {
        text.parse::<Bandwidth>().unwrap().bytes_per_second
    }

    #[test]
    fn bits_and_bytes_are_told_apart() {
        let rates = ["1Gbit/s", "2.5 Gbit/s", "100Mbit/s", "8 bit/s", "1 GiB/s", "125 MB/s"].map(bytes);
        assert_eq!(rates, [125e6, 312.5e6, 12.5e6, 1.0, f64::from(1 << 30), 125e6]);
        assert_eq!(["1 gbit/s", "1GBIT/S", "1 kBit/s", "1 Kbit/s"].map(bytes), [125e6, 125e6, 125.0, 125.0]);
        for wrong in [
            "",
            "fast",
            "10",
            "1 Gbit",
            "-1 Gbit/s",
            "0 bit/s",
            "NaN Gbit/s",
            "inf bit/s",
            "unlimited",
            "1e30 Tbit/s",
            "1 Gb/s",
            "ßbit/s",
        ] {
            assert!(wrong.parse::<Bandwidth>().unwrap_err().contains("write 10Gbit/s"), "{wrong}");
        }
    }

    #[test]
    fn rates_are_shown_as_they_are_written() {
        for text in ["1 Gbit/s", "2.5 Gbit/s", "100 Mbit/s", "1.23 Tbit/s", "999 kbit/s", "8 bit/s"] {
            assert_eq!(text.parse::<Bandwidth>().unwrap().to_string(), text);
        }
        let rounded = |text: &str| text.parse::<Bandwidth>().unwrap().rounded_up(2).to_string();
        assert_eq!(
            [rounded("1 Gbit/s"), rounded("1.01 Gbit/s"), rounded("987 Mbit/s")],
            ["1 Gbit/s", "1.1 Gbit/s", "990 Mbit/s"]
        );
    }
}
