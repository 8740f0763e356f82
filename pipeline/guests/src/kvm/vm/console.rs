//! The serial port, a 16550 whose output is read here, and the lines that the guest's program prints on it.

use super::program::SERIAL;

/// Ports of the device.
pub(super) const PORTS: std::ops::Range<u16> = SERIAL..SERIAL + 8;
/// The longest line that is stored; the rest is cut off.
pub(super) const MOST_LINE: usize = 128;
/// Line status: the transmitter is empty.
const EMPTY: u8 = 0x60;
/// Interrupt identification: none.
const NO_INTERRUPT: u8 = 1;
/// Line control: the first two registers are the divisor.
const DIVISOR: u8 = 0x80;

/// A line that the program printed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ConsoleLine {
    /// A vCPU has completed a pass.
    Pass { vcpu: u32, pass: u32, ticks: u32 },
    /// Any other line reports an error.
    Trouble(String),
}

/// The port's registers, and the line that is being written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Console {
    /// Their values as written: data is not stored.
    pub(super) registers: [u8; 8],
    /// The part of the line so far.
    pub(super) line: Vec<u8>,
}

impl Console {
    /// A byte written to one of its ports.
    pub(super) fn write(&mut self, port: u16, byte: u8) -> Option<ConsoleLine> {
        let register = usize::from(port - PORTS.start);
        if register > 0 || self.registers[3] & DIVISOR != 0 {
            self.registers[register] = byte;
            return None;
        }
        if byte != b'\n' {
            if self.line.len() < MOST_LINE {
                self.line.push(byte);
            }
            return None;
        }
        let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
        Some(understand(&line).unwrap_or(ConsoleLine::Trouble(line)))
    }

    /// A byte read from one of its ports.
    pub(super) fn read(&self, port: u16) -> u8 {
        match port - PORTS.start {
            2 => NO_INTERRUPT,
            5 => EMPTY,
            register => self.registers[usize::from(register)],
        }
    }
}

/// `v0 pass 0000002a ticks 000001f3`
fn understand(line: &str) -> Option<ConsoleLine> {
    let number = |digits: &str| u32::from_str_radix(digits, 16).ok();
    let mut words = line.split(' ');
    let vcpu = number(words.next()?.strip_prefix('v')?)?;
    let mut named = |name: &str| (words.next()? == name).then(|| number(words.next()?)).flatten();
    let (pass, ticks) = (named("pass")?, named("ticks")?);
    words.next().is_none().then_some(ConsoleLine::Pass { vcpu, pass, ticks })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(console: &mut Console, text: &str) -> Option<ConsoleLine> {
        text.bytes().filter_map(|byte| console.write(SERIAL, byte)).last()
    }

    #[test]
    fn lines_are_understood_or_are_trouble() {
        let mut console = Console::default();
        let pass = feed(&mut console, "v1 pass 0000002a ticks 000001f3\n");
        assert_eq!(pass, Some(ConsoleLine::Pass { vcpu: 1, pass: 42, ticks: 499 }));
        for line in ["v0 wrong page 00000107 pass 0000002b", "", "v0 pass 1", "v0 pass 1 ticks 2 more", "x"] {
            assert_eq!(feed(&mut console, &format!("{line}\n")), Some(ConsoleLine::Trouble(line.into())));
        }
        assert_eq!(feed(&mut console, &"x".repeat(1000)), None);
        assert_eq!(console.line.len(), MOST_LINE);
    }

    #[test]
    fn it_is_a_serial_port_that_is_always_ready() {
        let mut console = Console::default();
        assert_eq!(console.read(SERIAL + 5), EMPTY);
        console.write(SERIAL + 3, DIVISOR);
        assert_eq!(console.write(SERIAL, b'\n'), None);
        assert_eq!((console.read(SERIAL), console.line.len()), (b'\n', 0));
    }
}
