//! The guest's program.
//!
//! Each vCPU steps through its part of the region, page after page and pass after pass. In a page it compares the stamp
//! (the page's number) and some words (the pass before) with what it must have left there, and writes the stamp and the
//! words of this pass. It tells the host of each page, so that the host can set the pace, and says over the serial port that
//! a pass is complete, or which page was wrong:
//!
//! ```text
//! v0 pass 0000002a ticks 000001f3
//! v0 wrong page 00000107 pass 0000002b
//! ```
//!
//! The host answers each complete pass by writing its number into the guest's memory, where the next pass looks for it: so
//! that a write of the host's own that went astray is found too. vCPU 0 counts the timer's ticks.
//!
//! | register | holds |
//! |---|---|
//! | `r12`, `rsi` | where the vCPU's part begins and ends |
//! | `r13` | number of its first page |
//! | `r9` | bytes checked and written in each page |
//! | `r10` | number of the vCPU |
//! | `rbp`, `r8` | this pass, the pass before |
//! | `rdi`, `rbx` | the page, its number |
//! | `r14`, `r15` | where the vCPU's part of the free memory begins and ends |
//!
//! After each pass the vCPU looks at its free memory. Of eight pages it takes one in each pass, another in the next: it tells
//! the host, and then writes its number and the pass. In the pass after that it checks the page and gives it back. So pages go in
//! and out of use all the time, and at any time most are free.

use super::assembler::Reg::{R8, R9, R10, R11, R12, R13, R14, R15, Rax, Rbp, Rbx, Rcx, Rdi, Rdx, Rsi};
use super::assembler::{Assembler, If, Label};

/// The serial port's data register.
pub(super) const SERIAL: u16 = 0x3f8;
/// Calls of the host: a page is written.
pub(super) const PAGE_DONE: u16 = 0x510;
/// A page of free memory, by its number in RAM, is taken into use; when this returns it may be written.
pub(super) const PAGE_TAKEN: u16 = 0x514;
/// It is free again.
pub(super) const PAGE_FREED: u16 = 0x518;

/// Of so many pages of free memory one is in use at a time: a power of two.
const IN_USE: i32 = 8;

/// Where the program keeps what its vCPUs share, as addresses of its own.
pub(super) const LOCK: u64 = 0x6000;
/// Ticks of the timer.
pub(super) const TICKS: u64 = 0x6008;
/// The host's answers, a word for each vCPU.
pub(super) const ANSWERS: u64 = 0x7000;

/// The vector of the timer's interrupt.
pub(super) const TICK_VECTOR: u8 = 0x20;
/// Ticks of the timer's clock, of 1,193,182 Hz, from one interrupt to the next: 100 a second.
const TICK_PERIOD: u16 = 11_932;

/// The program's bytes, to be put anywhere, and where in them its interrupt handler begins.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) code: Vec<u8>,
    pub(super) on_tick: u64,
}

/// Writes the program. Its first byte is where every vCPU begins.
pub(super) fn program() -> Program {
    let mut a = Assembler::default();
    let routines = Routines::reserve(&mut a);
    main(&mut a, &routines);
    let on_tick = routines.write(&mut a);
    let (code, place) = a.finish();
    Program { code, on_tick: place(on_tick) }
}

fn main(a: &mut Assembler, routines: &Routines) {
    let [next_pass, wrong, page_done] = [a.label(), a.label(), a.label()];
    a.compare_value(R10, 0);
    a.jump_if(If::NotEqual, next_pass);
    a.call(routines.start_timer);

    a.place(next_pass);
    a.copy(R8, Rbp);
    a.add_value(Rbp, 1);
    a.copy(Rdi, R12);
    a.copy(Rbx, R13);

    let page = a.here();
    a.load(Rax, Rdi, 0);
    a.compare(Rax, Rbx);
    a.jump_if(If::NotEqual, wrong);
    a.copy(Rcx, R9);
    let word = a.here();
    a.subtract_value(Rcx, 8);
    a.jump_if(If::Equal, page_done);
    a.load_at(Rax, Rdi, Rcx);
    a.compare(Rax, R8);
    a.jump_if(If::NotEqual, wrong);
    a.store_at(Rdi, Rcx, Rbp);
    a.jump(word);

    a.place(page_done);
    a.store(Rdi, 0, Rbx);
    a.mov(Rdx, PAGE_DONE.into());
    a.out();
    a.add_value(Rdi, 4096);
    a.add_value(Rbx, 1);
    a.compare(Rdi, Rsi);
    a.jump_if(If::Below, page);
    a.call(routines.say_pass);
    a.call(routines.turn_free);
    a.jump(next_pass);

    // Said once, and made right: the passes to come are checked like those before.
    a.place(wrong);
    a.call(routines.say_wrong);
    a.copy(Rcx, R9);
    let mend = a.here();
    a.subtract_value(Rcx, 8);
    a.jump_if(If::Equal, page_done);
    a.store_at(Rdi, Rcx, Rbp);
    a.jump(mend);
}

/// What the program calls.
struct Routines {
    start_timer: Label,
    say_pass: Label,
    say_wrong: Label,
    say_wrong_free: Label,
    turn_free: Label,
    begin_line: Label,
    end_line: Label,
    put_text: Label,
    put_number: Label,
}

impl Routines {
    fn reserve(a: &mut Assembler) -> Self {
        Self {
            start_timer: a.label(),
            say_pass: a.label(),
            say_wrong: a.label(),
            say_wrong_free: a.label(),
            turn_free: a.label(),
            begin_line: a.label(),
            end_line: a.label(),
            put_text: a.label(),
            put_number: a.label(),
        }
    }

    /// Writes them, and returns where the interrupt handler is.
    fn write(&self, a: &mut Assembler) -> Label {
        self.start_timer(a);
        let [v, pass, ticks, wrong, wrong_free, lost, end] =
            ["v", " pass ", " ticks ", " wrong page ", " wrong free page ", " lost an answer before", "\n"]
                .map(|text| (a.label(), text));
        self.say_pass(a, pass.0, ticks.0, lost.0);
        self.say_wrong(a, self.say_wrong, wrong.0, pass.0);
        self.say_wrong(a, self.say_wrong_free, wrong_free.0, pass.0);
        self.turn_free(a);
        self.begin_line(a, v.0);
        self.end_line(a, end.0);
        self.put_text(a);
        self.put_number(a);
        let on_tick = on_tick(a);
        for (label, text) in [v, pass, ticks, wrong, wrong_free, lost, end] {
            a.place(label);
            a.data(text.as_bytes());
            a.data(&[0]);
        }
        on_tick
    }

    /// Interrupt controllers and timer as PCs have them: vectors from 0x20 on, all masked but the timer's.
    fn start_timer(&self, a: &mut Assembler) {
        a.place(self.start_timer);
        let first = [(0x20, 0x11), (0x21, TICK_VECTOR), (0x21, 4), (0x21, 1), (0x21, 0xfe)];
        let second = [(0xa0, 0x11), (0xa1, TICK_VECTOR + 8), (0xa1, 2), (0xa1, 1), (0xa1, 0xff)];
        let [low, high] = TICK_PERIOD.to_le_bytes();
        let timer = [(0x43, 0x34), (0x40, low), (0x40, high)];
        for (port, value) in first.into_iter().chain(second).chain(timer) {
            a.mov(Rdx, port);
            a.mov(Rax, value.into());
            a.out();
        }
        a.enable_interrupts();
        a.ret();
    }

    fn say_pass(&self, a: &mut Assembler, pass: Label, ticks: Label, lost: Label) {
        a.place(self.say_pass);
        a.call(self.begin_line);
        a.mov(Rdx, ANSWERS);
        a.copy(Rax, R10);
        a.rotate_left(Rax, 3);
        a.add(Rdx, Rax);
        a.load(Rax, Rdx, 0);
        a.compare(Rax, R8);
        let answered = a.label();
        a.jump_if(If::Equal, answered);
        self.text(a, lost);
        a.place(answered);
        self.text(a, pass);
        self.number(a, Rbp);
        self.text(a, ticks);
        a.mov(Rdx, TICKS);
        a.load(Rcx, Rdx, 0);
        a.call(self.put_number);
        a.call(self.end_line);
        a.ret();
    }

    /// Gives back what the last pass took of the free memory, and takes other pages.
    fn turn_free(&self, a: &mut Assembler) {
        a.place(self.turn_free);
        let [page, take, wrong, give_back, next, end] = [(); 6].map(|()| a.label());
        a.copy(Rdi, R14);
        a.place(page);
        a.compare(Rdi, R15);
        a.jump_if(If::Equal, end);
        // The page's number: its address without the 12 zeros.
        a.copy(Rbx, Rdi);
        a.rotate_left(Rbx, 64 - 12);
        a.copy(Rax, Rbx);
        a.add(Rax, Rbp);
        a.and_value(Rax, IN_USE - 1);
        a.jump_if(If::Equal, take);
        a.compare_value(Rax, 1);
        a.jump_if(If::NotEqual, next);
        // Before the first pass nothing was taken.
        a.compare_value(R8, 0);
        a.jump_if(If::Equal, next);
        a.load(Rax, Rdi, 0);
        a.compare(Rax, Rbx);
        a.jump_if(If::NotEqual, wrong);
        a.load(Rax, Rdi, 4088);
        a.compare(Rax, R8);
        a.jump_if(If::Equal, give_back);
        a.place(wrong);
        a.call(self.say_wrong_free);
        a.place(give_back);
        tell_page(a, PAGE_FREED);
        a.jump(next);

        a.place(take);
        tell_page(a, PAGE_TAKEN);
        a.store(Rdi, 0, Rbx);
        a.store(Rdi, 4088, Rbp);

        a.place(next);
        a.add_value(Rdi, 4096);
        a.jump(page);
        a.place(end);
        a.ret();
    }

    fn say_wrong(&self, a: &mut Assembler, say: Label, wrong: Label, pass: Label) {
        a.place(say);
        a.call(self.begin_line);
        self.text(a, wrong);
        self.number(a, Rbx);
        self.text(a, pass);
        self.number(a, Rbp);
        a.call(self.end_line);
        a.ret();
    }

    /// Waits until no other vCPU writes a line, and says which one this is.
    fn begin_line(&self, a: &mut Assembler, v: Label) {
        a.place(self.begin_line);
        let ours = a.label();
        a.mov(Rdx, LOCK);
        let attempt = a.here();
        a.mov(Rax, 1);
        a.exchange(Rdx, 0, Rax);
        a.compare_value(Rax, 0);
        a.jump_if(If::Equal, ours);
        a.pause();
        a.jump(attempt);
        a.place(ours);
        self.text(a, v);
        a.copy(Rax, R10);
        put_digit(a);
        a.ret();
    }

    fn end_line(&self, a: &mut Assembler, end: Label) {
        a.place(self.end_line);
        self.text(a, end);
        a.mov(Rdx, LOCK);
        a.mov(Rax, 0);
        a.store(Rdx, 0, Rax);
        a.ret();
    }

    fn text(&self, a: &mut Assembler, text: Label) {
        a.address(R11, text);
        a.call(self.put_text);
    }

    fn number(&self, a: &mut Assembler, number: super::assembler::Reg) {
        a.copy(Rcx, number);
        a.call(self.put_number);
    }

    /// Writes the bytes at `r11`, up to a zero. The port takes them as fast as they come.
    fn put_text(&self, a: &mut Assembler) {
        a.place(self.put_text);
        let end = a.label();
        a.mov(Rdx, SERIAL.into());
        let next = a.here();
        a.load_byte(Rax, R11, 0);
        a.compare_value(Rax, 0);
        a.jump_if(If::Equal, end);
        a.out();
        a.add_value(R11, 1);
        a.jump(next);
        a.place(end);
        a.ret();
    }

    /// Writes the low 32 bits of `rcx` as eight hexadecimal digits.
    fn put_number(&self, a: &mut Assembler) {
        a.place(self.put_number);
        a.rotate_left(Rcx, 32);
        a.mov(R11, 8);
        let next = a.here();
        a.rotate_left(Rcx, 4);
        a.copy(Rax, Rcx);
        put_digit(a);
        a.subtract_value(R11, 1);
        a.jump_if(If::NotEqual, next);
        a.ret();
    }
}

/// Tells the host of the page whose number is in `rbx`.
fn tell_page(a: &mut Assembler, port: u16) {
    a.mov(Rdx, port.into());
    a.copy(Rax, Rbx);
    a.out_word();
}

/// Writes the low four bits of `rax` as a digit.
fn put_digit(a: &mut Assembler) {
    let decimal = a.label();
    a.and_value(Rax, 15);
    a.compare_value(Rax, 10);
    a.jump_if(If::Below, decimal);
    a.add_value(Rax, i32::from(b'a' - b'0' - 10));
    a.place(decimal);
    a.add_value(Rax, b'0'.into());
    a.mov(Rdx, SERIAL.into());
    a.out();
}

/// The timer's interrupt: counts, and lets the next one come.
fn on_tick(a: &mut Assembler) -> Label {
    let handler = a.here();
    a.push(Rax);
    a.push(Rdx);
    a.mov(Rdx, TICKS);
    a.load(Rax, Rdx, 0);
    a.add_value(Rax, 1);
    a.store(Rdx, 0, Rax);
    a.mov(Rdx, 0x20);
    a.mov(Rax, 0x20);
    a.out();
    a.pop(Rdx);
    a.pop(Rax);
    a.interrupt_return();
    handler
}
