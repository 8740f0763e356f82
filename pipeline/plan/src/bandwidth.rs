//! Bandwidths of links, shown in the units in which they were asked for: `1 Gbit/s`, `100 MB/s`, `64 MiB/s`.

use std::fmt;
use std::str::FromStr;

use memferry::units::{self, Units};

/// The bandwidth of a link.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bandwidth {
    /// Bytes per second; more than 0.
    pub bytes_per_second: f64,
    /// The units in which it is shown.
    pub units: Units,
}

impl Bandwidth {
    /// The nearest rate with this number of digits that is not smaller.
    #[must_use]
    pub fn rounded_up(self, digits: i32) -> Self {
        let of_a_unit = self.unit().1 / self.units.of_a_byte();
        let amount = self.bytes_per_second / of_a_unit;
        let digit = 10_f64.powf(amount.log10().floor() - f64::from(digits - 1));
        Self { bytes_per_second: (amount / digit - 1e-9).ceil() * digit * of_a_unit, ..self }
    }

    /// The unit in which it is shown, and the bytes per second of one such unit.
    fn unit(self) -> (&'static str, f64) {
        let amount = self.bytes_per_second * self.units.of_a_byte();
        let [.., least] = self.units.all();
        self.units.all().into_iter().find(|&(_, unit)| amount >= unit * 0.9995).unwrap_or(least)
    }
}

impl fmt::Display for Bandwidth {
    /// Rounded to three digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, unit) = self.unit();
        let amount = self.bytes_per_second * self.units.of_a_byte() / unit;
        let decimals = if amount < 9.995 { 2 } else { usize::from(amount < 99.95) };
        let text = format!("{amount:.decimals$}");
        let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
        write!(f, "{text} {name}/s")
    }
}

impl FromStr for Bandwidth {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = units::rate(text).filter(|(bytes, _)| (1..1_000_000_000_000_000).contains(bytes));
        let (bytes, units) = found.ok_or_else(|| {
            format!("{text:?} is no bandwidth; write 10Gbit/s or 100 Mbit/s in bits, 1 GiB/s or 120 MB/s in bytes")
        })?;
        Ok(Self { bytes_per_second: bytes as f64, units })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_link_carries_is_refused() {
        for wrong in ["", "10", "-1 Gbit/s", "0 bit/s", "unlimited", "1e30 Tbit/s", "1 Gb/s"] {
            assert!(wrong.parse::<Bandwidth>().unwrap_err().contains("write 10Gbit/s"), "{wrong}");
        }
    }

    #[test]
    fn rates_are_shown_as_they_are_written() {
        for text in [
            "1 Gbit/s",
            "2.5 Gbit/s",
            "100 Mbit/s",
            "1.23 Tbit/s",
            "999 kbit/s",
            "8 bit/s",
            "64 MiB/s",
            "1.5 GiB/s",
            "120 MB/s",
        ] {
            assert_eq!(text.parse::<Bandwidth>().unwrap().to_string(), text);
        }
        let rounded = |text: &str| text.parse::<Bandwidth>().unwrap().rounded_up(2).to_string();
        assert_eq!(
            ["1 Gbit/s", "1.01 Gbit/s", "987 Mbit/s", "64.1 MiB/s", "121 MB/s"].map(rounded),
            ["1 Gbit/s", "1.1 Gbit/s", "990 Mbit/s", "65 MiB/s", "130 MB/s"]
        );
    }
}
