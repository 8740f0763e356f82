//! A tiny assembler for x86-64: one function for each instruction that the guest's program uses.
//!
//! Operands are 64 bits wide unless said otherwise. Memory is addressed by a base register and a displacement, or by a base
//! and an index. Jumps go to [`Label`]s, which may be placed later.

/// A general register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Reg {
    Rax,
    Rcx,
    Rdx,
    Rbx,
    Rsp,
    Rbp,
    Rsi,
    Rdi,
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
}

impl Reg {
    /// The three bits of it that stand in an instruction's own bytes.
    fn low(self) -> u8 {
        self as u8 & 7
    }

    /// The fourth, which stands in the REX prefix.
    fn high(self) -> u8 {
        self as u8 >> 3
    }
}

/// When a conditional jump is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum If {
    Below = 2,
    Equal = 4,
    NotEqual = 5,
}

/// A place in the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Label(usize);

/// A program being written.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    code: Vec<u8>,
    labels: Vec<Option<usize>>,
    /// Where a distance to a label is to be written, relative to the byte after it.
    open: Vec<(usize, Label)>,
}

const REX_W: u8 = 0x48;

impl Assembler {
    /// A label that is placed later.
    pub(super) fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// Places a label here.
    pub(super) fn place(&mut self, label: Label) {
        let before = self.labels[label.0].replace(self.code.len());
        assert_eq!(before, None, "a label stands in one place");
    }

    /// A label that stands here.
    pub(super) fn here(&mut self) -> Label {
        let label = self.label();
        self.place(label);
        label
    }

    /// Bytes that are no instructions.
    pub(super) fn data(&mut self, bytes: &[u8]) {
        self.code.extend(bytes);
    }

    /// `mov to, value`
    pub(super) fn mov(&mut self, to: Reg, value: u64) {
        self.data(&[REX_W | to.high(), 0xb8 | to.low()]);
        self.data(&value.to_le_bytes());
    }

    /// `mov to, from`
    pub(super) fn copy(&mut self, to: Reg, from: Reg) {
        self.two(0x89, from, to);
    }

    /// `add to, from`
    pub(super) fn add(&mut self, to: Reg, from: Reg) {
        self.two(0x01, from, to);
    }

    /// `cmp one, other`
    pub(super) fn compare(&mut self, one: Reg, other: Reg) {
        self.two(0x39, other, one);
    }

    /// `add to, value`
    pub(super) fn add_value(&mut self, to: Reg, value: i32) {
        self.value(0, to, value);
    }

    /// `sub from, value`
    pub(super) fn subtract_value(&mut self, from: Reg, value: i32) {
        self.value(5, from, value);
    }

    /// `and to, value`
    pub(super) fn and_value(&mut self, to: Reg, value: i32) {
        self.value(4, to, value);
    }

    /// `cmp one, value`
    pub(super) fn compare_value(&mut self, one: Reg, value: i32) {
        self.value(7, one, value);
    }

    /// `rol to, bits`
    pub(super) fn rotate_left(&mut self, to: Reg, bits: u8) {
        self.data(&[REX_W | to.high(), 0xc1, 0xc0 | to.low(), bits]);
    }

    /// `mov to, [base + displacement]`
    pub(super) fn load(&mut self, to: Reg, base: Reg, displacement: i32) {
        self.memory(&[0x8b], to, base, displacement);
    }

    /// `mov [base + displacement], from`
    pub(super) fn store(&mut self, base: Reg, displacement: i32, from: Reg) {
        self.memory(&[0x89], from, base, displacement);
    }

    /// `movzx to, byte [base + displacement]`
    pub(super) fn load_byte(&mut self, to: Reg, base: Reg, displacement: i32) {
        self.memory(&[0x0f, 0xb6], to, base, displacement);
    }

    /// `xchg [base + displacement], with`: one step to all other vCPUs.
    pub(super) fn exchange(&mut self, base: Reg, displacement: i32, with: Reg) {
        self.memory(&[0x87], with, base, displacement);
    }

    /// `mov to, [base + index]`
    pub(super) fn load_at(&mut self, to: Reg, base: Reg, index: Reg) {
        self.indexed(0x8b, to, base, index);
    }

    /// `mov [base + index], from`
    pub(super) fn store_at(&mut self, base: Reg, index: Reg, from: Reg) {
        self.indexed(0x89, from, base, index);
    }

    /// `push from`
    pub(super) fn push(&mut self, from: Reg) {
        assert_eq!(from.high(), 0, "{from:?} is not used so");
        self.data(&[0x50 | from.low()]);
    }

    /// `pop to`
    pub(super) fn pop(&mut self, to: Reg) {
        assert_eq!(to.high(), 0, "{to:?} is not used so");
        self.data(&[0x58 | to.low()]);
    }

    /// `lea to, [label]`
    pub(super) fn address(&mut self, to: Reg, label: Label) {
        self.data(&[REX_W | to.high() << 2, 0x8d, to.low() << 3 | 5]);
        self.distance(label);
    }

    /// `jmp label`
    pub(super) fn jump(&mut self, label: Label) {
        self.data(&[0xe9]);
        self.distance(label);
    }

    /// `jcc label`
    pub(super) fn jump_if(&mut self, condition: If, label: Label) {
        self.data(&[0x0f, 0x80 | condition as u8]);
        self.distance(label);
    }

    /// `call label`
    pub(super) fn call(&mut self, label: Label) {
        self.data(&[0xe8]);
        self.distance(label);
    }

    /// `ret`
    pub(super) fn ret(&mut self) {
        self.data(&[0xc3]);
    }

    /// `iretq`
    pub(super) fn interrupt_return(&mut self) {
        self.data(&[REX_W, 0xcf]);
    }

    /// `out dx, al`
    pub(super) fn out(&mut self) {
        self.data(&[0xee]);
    }

    /// `out dx, eax`
    pub(super) fn out_word(&mut self) {
        self.data(&[0xef]);
    }

    /// `pause`
    pub(super) fn pause(&mut self) {
        self.data(&[0xf3, 0x90]);
    }

    /// `sti`
    pub(super) fn enable_interrupts(&mut self) {
        self.data(&[0xfb]);
    }

    /// The program, and where its labels stand in it.
    ///
    /// # Panics
    /// If a label that is jumped to was not placed.
    pub(super) fn finish(mut self) -> (Vec<u8>, impl Fn(Label) -> u64) {
        let labels = std::mem::take(&mut self.labels);
        let place = move |label: Label| labels[label.0].expect("a label that is used is placed");
        for &(at, label) in &self.open {
            let distance = i64::try_from(place(label)).expect("small") - i64::try_from(at + 4).expect("small");
            let distance = i32::try_from(distance).expect("a small program");
            self.code[at..at + 4].copy_from_slice(&distance.to_le_bytes());
        }
        (self.code, move |label| place(label) as u64)
    }

    fn distance(&mut self, label: Label) {
        self.open.push((self.code.len(), label));
        self.data(&[0; 4]);
    }

    /// An instruction on two registers: `reg` and `rm` of its second operand byte.
    fn two(&mut self, opcode: u8, reg: Reg, rm: Reg) {
        self.data(&[REX_W | reg.high() << 2 | rm.high(), opcode, 0xc0 | reg.low() << 3 | rm.low()]);
    }

    /// An arithmetic instruction on a register and a value.
    fn value(&mut self, operation: u8, to: Reg, value: i32) {
        self.data(&[REX_W | to.high(), 0x81, 0xc0 | operation << 3 | to.low()]);
        self.data(&value.to_le_bytes());
    }

    fn memory(&mut self, opcode: &[u8], reg: Reg, base: Reg, displacement: i32) {
        assert_ne!(base.low(), Reg::Rsp.low(), "{base:?} as base needs another byte");
        self.data(&[REX_W | reg.high() << 2 | base.high()]);
        self.data(opcode);
        self.data(&[0x80 | reg.low() << 3 | base.low()]);
        self.data(&displacement.to_le_bytes());
    }

    fn indexed(&mut self, opcode: u8, reg: Reg, base: Reg, index: Reg) {
        assert!(base.low() != Reg::Rbp.low() && index != Reg::Rsp, "[{base:?} + {index:?}] means something else");
        self.data(&[REX_W | reg.high() << 2 | index.high() << 1 | base.high(), opcode, reg.low() << 3 | 4]);
        self.data(&[index.low() << 3 | base.low()]);
    }
}

#[cfg(test)]
mod tests {
    use super::Reg::*;
    use super::*;

    fn code(write: impl FnOnce(&mut Assembler)) -> Vec<u8> {
        let mut assembler = Assembler::default();
        write(&mut assembler);
        assembler.finish().0
    }

    /// Each instruction as the GNU assembler encodes it, with 32-bit displacements.
    #[test]
    fn instructions_are_encoded() {
        let case = |write: fn(&mut Assembler), expected: &[u8]| assert_eq!(code(write), expected, "{expected:02x?}");
        case(|a| a.mov(Rax, 0x1122_3344_5566_7788), &[0x48, 0xb8, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]);
        case(|a| a.mov(R9, 1), &[0x49, 0xb9, 1, 0, 0, 0, 0, 0, 0, 0]);
        case(|a| a.copy(Rcx, R9), &[0x4c, 0x89, 0xc9]);
        case(|a| a.copy(R8, Rbp), &[0x49, 0x89, 0xe8]);
        case(|a| a.add(Rax, Rbx), &[0x48, 0x01, 0xd8]);
        case(|a| a.compare(Rdi, Rsi), &[0x48, 0x39, 0xf7]);
        case(|a| a.compare(Rax, R8), &[0x4c, 0x39, 0xc0]);
        case(|a| a.add_value(Rdi, 4096), &[0x48, 0x81, 0xc7, 0, 0x10, 0, 0]);
        case(|a| a.subtract_value(Rcx, 8), &[0x48, 0x81, 0xe9, 8, 0, 0, 0]);
        case(|a| a.and_value(Rax, 15), &[0x48, 0x81, 0xe0, 15, 0, 0, 0]);
        case(|a| a.compare_value(R10, 0), &[0x49, 0x81, 0xfa, 0, 0, 0, 0]);
        case(|a| a.rotate_left(Rcx, 4), &[0x48, 0xc1, 0xc1, 4]);
        case(|a| a.load(Rax, Rdi, 16), &[0x48, 0x8b, 0x87, 16, 0, 0, 0]);
        case(|a| a.load(R8, R11, -1), &[0x4d, 0x8b, 0x83, 0xff, 0xff, 0xff, 0xff]);
        case(|a| a.store(Rdi, 0, Rbx), &[0x48, 0x89, 0x9f, 0, 0, 0, 0]);
        case(|a| a.load_byte(Rax, Rsi, 0), &[0x48, 0x0f, 0xb6, 0x86, 0, 0, 0, 0]);
        case(|a| a.exchange(Rdx, 8, Rax), &[0x48, 0x87, 0x82, 8, 0, 0, 0]);
        case(|a| a.load_at(Rax, Rdi, Rcx), &[0x48, 0x8b, 0x04, 0x0f]);
        case(|a| a.store_at(Rdi, Rcx, Rbp), &[0x48, 0x89, 0x2c, 0x0f]);
        case(|a| a.load_at(R8, R9, R10), &[0x4f, 0x8b, 0x04, 0x11]);
        case(|a| a.push(Rax), &[0x50]);
        case(|a| a.pop(Rsi), &[0x5e]);
        case(Assembler::ret, &[0xc3]);
        case(Assembler::interrupt_return, &[0x48, 0xcf]);
        case(Assembler::out, &[0xee]);
        case(Assembler::out_word, &[0xef]);
        case(|a| a.copy(Rdi, R14), &[0x4c, 0x89, 0xf7]);
        case(|a| a.compare(Rdi, R15), &[0x4c, 0x39, 0xff]);
        case(Assembler::pause, &[0xf3, 0x90]);
        case(Assembler::enable_interrupts, &[0xfb]);
    }

    #[test]
    fn jumps_go_to_labels_before_and_behind() {
        let code = code(|a| {
            let begin = a.here();
            let end = a.label();
            a.jump_if(If::NotEqual, end);
            a.call(begin);
            a.jump(begin);
            a.address(Rsi, end);
            a.place(end);
        });
        let expected = [
            &[0x0f, 0x85, 17, 0, 0, 0][..],
            &[0xe8, 0xf5, 0xff, 0xff, 0xff],
            &[0xe9, 0xf0, 0xff, 0xff, 0xff],
            &[0x48, 0x8d, 0x35, 0, 0, 0, 0],
        ];
        assert_eq!(code, expected.concat());
    }
}
