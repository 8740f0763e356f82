//! Amounts of data in human-readable form: in bytes (`64 MiB`, `100 MB`) or in bits (`1 Gbit`), as sizes or rates.
//!
//! The one parser for the configuration, `--set`, `set` and `plan`.

use bytesize::ByteSize;

/// Units of bits.
pub const BITS: [(&str, f64); 5] = [("Tbit", 1e12), ("Gbit", 1e9), ("Mbit", 1e6), ("kbit", 1e3), ("bit", 1.0)];
/// Units of bytes, by thousands.
pub const DECIMAL: [(&str, f64); 5] = [("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)];
/// Units of bytes, by 1,024.
pub const BINARY: [(&str, f64); 5] =
    [("TiB", 1_099_511_627_776.0), ("GiB", 1_073_741_824.0), ("MiB", 1_048_576.0), ("KiB", 1024.0), ("B", 1.0)];

/// The kind of unit of an amount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Units {
    /// Bits, by thousands: the unit of network links.
    #[default]
    Bits,
    /// Bytes, by thousands.
    Decimal,
    /// Bytes, by 1,024.
    Binary,
}

impl Units {
    /// Its units, the largest first, and the size of each in bits or bytes.
    pub fn all(self) -> [(&'static str, f64); 5] {
        match self {
            Self::Bits => BITS,
            Self::Decimal => DECIMAL,
            Self::Binary => BINARY,
        }
    }

    /// Units of this kind in a byte: 8 bits, or 1 byte.
    pub fn of_a_byte(self) -> f64 {
        if self == Self::Bits { 8.0 } else { 1.0 }
    }
}

/// Bytes, as they are written; bits are rounded to whole bytes.
pub fn amount(text: &str) -> Option<(u64, Units)> {
    let text = text.trim();
    if let Some((number, unit)) = in_bits(text) {
        let bytes = number.trim().parse::<f64>().ok()? * unit / 8.0;
        let fits = (0.0..9e18).contains(&bytes);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it fits")]
        return fits.then(|| (bytes.round() as u64, Units::Bits));
    }
    let bytes = text.parse::<ByteSize>().ok()?.0;
    let is_binary = text.contains(['i', 'I']) || text.ends_with(|last: char| last.is_ascii_digit());
    Some((bytes, if is_binary { Units::Binary } else { Units::Decimal }))
}

/// Bytes a second.
pub fn rate(text: &str) -> Option<(u64, Units)> {
    let text = text.trim();
    let (bytes, units) = amount(text.strip_suffix("/s").or_else(|| text.strip_suffix("/S"))?)?;
    // A "b" is ambiguous.
    let is_clear = units == Units::Bits || !text.contains('b');
    is_clear.then_some((bytes, units))
}

/// The number and the unit, if the unit is one of bits. Case is ignored.
fn in_bits(text: &str) -> Option<(&str, f64)> {
    BITS.into_iter().find_map(|(name, unit)| {
        let (number, ending) = text.split_at_checked(text.len().checked_sub(name.len())?)?;
        ending.eq_ignore_ascii_case(name).then_some((number, unit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_and_bytes_are_distinguished() {
        let bytes = |text: &str| rate(text).unwrap();
        assert_eq!(bytes("1Gbit/s"), (125_000_000, Units::Bits));
        assert_eq!(bytes("2.5 Gbit/s"), (312_500_000, Units::Bits));
        assert_eq!(bytes(" 100 Mbit/s "), (12_500_000, Units::Bits));
        assert_eq!(
            ["1 gbit/s", "1GBIT/S", "1 kBit/s", "1 Kbit/s"].map(rate),
            [
                Some((125_000_000, Units::Bits)),
                Some((125_000_000, Units::Bits)),
                Some((125, Units::Bits)),
                Some((125, Units::Bits)),
            ]
        );
        assert_eq!(bytes("64 KiB/s"), (65_536, Units::Binary));
        assert_eq!(bytes("125 MB/s"), (125_000_000, Units::Decimal));
        assert_eq!(amount("512 Mbit"), Some((64_000_000, Units::Bits)));
        assert_eq!(amount("1.5 GiB"), Some((1_610_612_736, Units::Binary)));
        assert_eq!(amount("4096"), Some((4096, Units::Binary)));
    }

    #[test]
    fn what_is_no_amount_is_refused() {
        for wrong in ["", "fast", "-1 Gbit", "NaN Gbit", "inf bit", "1e30 Tbit", "1 Gbits", "ßbit", "bit", "64 MiBB"] {
            assert_eq!(amount(wrong), None, "{wrong}");
        }
        for wrong in ["1 Gb/s", "1 Gbit", "1 GiB", "10", "/s", "unlimited"] {
            assert_eq!(rate(wrong), None, "{wrong}");
        }
    }
}
