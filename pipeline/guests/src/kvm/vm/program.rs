//! The guest's program.
//!
//! Each vCPU steps through its part of the region, page after page and pass after pass. In a page it compares the stamp
//! (the page's number) and some words (the previous pass) with the values that it must have left there, and writes the
//! stamp and the words of this pass. It notifies the host of each page, so that the host can set the pace, and reports
//! over the serial port that a pass is complete, or which page was wrong:
//!
//! ```text
//! v0 pass 0000002a ticks 000001f3
//! v0 wrong page 00000107 pass 0000002b
//! ```
//!
//! The host answers each complete pass by writing its number into the guest's memory, where the next pass checks it.
//! This detects a lost write of the host as well. vCPU 0 counts the timer's ticks.
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
//! After each pass the vCPU visits its free memory. Of eight pages it takes one in each pass, another in the next: it
//! notifies the host, and then writes its number and the pass. In the pass after that it checks the page and gives it
//! back. So pages are taken and freed all the time, and at any time most are free.

use std::arch::global_asm;
use std::slice;

/// The serial port's data register.
pub(super) const SERIAL: u16 = 0x3f8;
/// Notifications to the host: a page is written.
pub(super) const PAGE_DONE: u16 = 0x510;
/// A page of free memory, by its number in RAM, is taken into use; once this returns it may be written.
pub(super) const PAGE_TAKEN: u16 = 0x514;
/// It is free again.
pub(super) const PAGE_FREED: u16 = 0x518;

/// One page in this many of the free memory is in use at a time: a power of two.
const IN_USE: u32 = 8;

/// Where the program stores what its vCPUs share, as addresses of its own.
pub(super) const LOCK: u64 = 0x6000;
/// Ticks of the timer.
pub(super) const TICKS: u64 = 0x6008;
/// The host's answers, a word for each vCPU.
pub(super) const ANSWERS: u64 = 0x7000;

/// The vector of the timer's interrupt.
pub(super) const TICK_VECTOR: u8 = 0x20;
/// Ticks of the timer's clock, of 1,193,182 Hz, between two interrupts: 100 interrupts a second.
const TICK_PERIOD: u16 = 11_932;

/// The first port of a programmable interrupt controller, and the next one, which takes its settings.
const FIRST_PIC: u16 = 0x20;
const SECOND_PIC: u16 = 0xa0;
/// The command port of the interval timer, and the data port of its channel 0.
const TIMER_COMMAND: u16 = 0x43;
const TIMER_CHANNEL_0: u16 = 0x40;

// The code is read-only data of this program, and runs only where it is copied to: it refers only to itself, by
// relative distances, and to the addresses above.
global_asm!(
    r#"
    .pushsection .rodata.memferry_kvm_program, "a", @progbits
    .globl memferry_kvm_program
    .globl memferry_kvm_program_on_tick
    .globl memferry_kvm_program_end
    .hidden memferry_kvm_program
    .hidden memferry_kvm_program_on_tick
    .hidden memferry_kvm_program_end

    .macro outb_to port, value
        mov edx, \port
        mov eax, \value
        out dx, al
    .endm
    .macro say text
        lea r11, [rip + \text]
        call .Lmemferry_put_text
    .endm
    .macro say_number number
        mov rcx, \number
        call .Lmemferry_put_number
    .endm
    // Notifies the host of the number of the page.
    .macro call_host port
        mov edx, \port
        mov eax, ebx
        out dx, eax
    .endm
    // Writes the low four bits of rax as a digit.
    .macro put_digit
        and eax, 15
        cmp eax, 10
        jb 101f
        add eax, 'a' - '0' - 10
    101:
        add eax, '0'
        mov edx, {SERIAL}
        out dx, al
    .endm

memferry_kvm_program:
    test r10, r10
    jnz .Lmemferry_next_pass
    call .Lmemferry_start_timer

.Lmemferry_next_pass:
    mov r8, rbp
    add rbp, 1
    mov rdi, r12
    mov rbx, r13
.Lmemferry_page:
    cmp [rdi], rbx
    jne .Lmemferry_wrong
    mov rcx, r9
2:  sub rcx, 8
    jz .Lmemferry_page_done
    cmp [rdi + rcx], r8
    jne .Lmemferry_wrong
    mov [rdi + rcx], rbp
    jmp 2b
.Lmemferry_page_done:
    mov [rdi], rbx
    call_host {PAGE_DONE}
    add rdi, 4096
    add rbx, 1
    cmp rdi, rsi
    jb .Lmemferry_page
    call .Lmemferry_say_pass
    call .Lmemferry_turn_free
    jmp .Lmemferry_next_pass

// A wrong page is reported once and then corrected: later passes check it like the others.
.Lmemferry_wrong:
    lea r11, [rip + .Lmemferry_text_wrong]
    call .Lmemferry_say_wrong
    mov rcx, r9
2:  sub rcx, 8
    jz .Lmemferry_page_done
    mov [rdi + rcx], rbp
    jmp 2b

// Interrupt controllers and timer as in a PC: vectors from TICK_VECTOR on, all masked but the timer's.
.Lmemferry_start_timer:
    outb_to {FIRST_PIC}, 0x11
    outb_to {FIRST_PIC} + 1, {TICK_VECTOR}
    outb_to {FIRST_PIC} + 1, 4
    outb_to {FIRST_PIC} + 1, 1
    outb_to {FIRST_PIC} + 1, 0xfe
    outb_to {SECOND_PIC}, 0x11
    outb_to {SECOND_PIC} + 1, {TICK_VECTOR} + 8
    outb_to {SECOND_PIC} + 1, 2
    outb_to {SECOND_PIC} + 1, 1
    outb_to {SECOND_PIC} + 1, 0xff
    outb_to {TIMER_COMMAND}, 0x34
    outb_to {TIMER_CHANNEL_0}, {TICK_PERIOD} & 0xff
    outb_to {TIMER_CHANNEL_0}, {TICK_PERIOD} >> 8
    sti
    ret

.Lmemferry_say_pass:
    call .Lmemferry_begin_line
    mov edx, {ANSWERS}
    cmp [rdx + r10 * 8], r8
    je 2f
    say .Lmemferry_text_lost
2:  say .Lmemferry_text_pass
    say_number rbp
    say .Lmemferry_text_ticks
    mov edx, {TICKS}
    mov rcx, [rdx]
    call .Lmemferry_put_number
    jmp .Lmemferry_end_line

// Gives back the free pages that the last pass took, and takes other pages.
.Lmemferry_turn_free:
    mov rdi, r14
.Lmemferry_free_page:
    cmp rdi, r15
    je 9f
    mov rbx, rdi
    shr rbx, 12
    lea rax, [rbx + rbp]
    and eax, {IN_USE} - 1
    jz 4f
    cmp eax, 1
    jne 5f
    // Before the first pass nothing was taken.
    test r8, r8
    jz 5f
    cmp [rdi], rbx
    jne 2f
    cmp [rdi + 4088], r8
    je 3f
2:  lea r11, [rip + .Lmemferry_text_wrong_free]
    call .Lmemferry_say_wrong
3:  call_host {PAGE_FREED}
    jmp 5f
4:  call_host {PAGE_TAKEN}
    mov [rdi], rbx
    mov [rdi + 4088], rbp
5:  add rdi, 4096
    jmp .Lmemferry_free_page
9:  ret

// Writes the text at r11, the page and the pass.
.Lmemferry_say_wrong:
    push r11
    call .Lmemferry_begin_line
    pop r11
    call .Lmemferry_put_text
    say_number rbx
    say .Lmemferry_text_pass
    say_number rbp
    jmp .Lmemferry_end_line

// Waits until no other vCPU writes a line, and records that this one does.
.Lmemferry_begin_line:
    mov edx, {LOCK}
2:  mov eax, 1
    xchg [rdx], rax
    test rax, rax
    jz 3f
    pause
    jmp 2b
3:  say .Lmemferry_text_vcpu
    mov rax, r10
    put_digit
    ret

.Lmemferry_end_line:
    say .Lmemferry_text_end
    mov edx, {LOCK}
    xor eax, eax
    mov [rdx], rax
    ret

// Writes the bytes at r11, up to a zero. The port accepts them without a wait.
.Lmemferry_put_text:
    mov edx, {SERIAL}
2:  movzx eax, byte ptr [r11]
    test eax, eax
    jz 3f
    out dx, al
    add r11, 1
    jmp 2b
3:  ret

// Writes the low 32 bits of rcx as eight hexadecimal digits.
.Lmemferry_put_number:
    rol rcx, 32
    mov r11d, 8
2:  rol rcx, 4
    mov rax, rcx
    put_digit
    sub r11d, 1
    jnz 2b
    ret

// The timer's interrupt: counts, and enables the next one.
memferry_kvm_program_on_tick:
    push rax
    push rdx
    mov edx, {TICKS}
    add qword ptr [rdx], 1
    outb_to {FIRST_PIC}, 0x20
    pop rdx
    pop rax
    iretq

.Lmemferry_text_vcpu: .asciz "v"
.Lmemferry_text_pass: .asciz " pass "
.Lmemferry_text_ticks: .asciz " ticks "
.Lmemferry_text_wrong: .asciz " wrong page "
.Lmemferry_text_wrong_free: .asciz " wrong free page "
.Lmemferry_text_lost: .asciz " lost an answer before"
.Lmemferry_text_end: .asciz "\n"

memferry_kvm_program_end:
    .purgem outb_to
    .purgem say
    .purgem say_number
    .purgem call_host
    .purgem put_digit
    .popsection
    "#,
    SERIAL = const SERIAL,
    PAGE_DONE = const PAGE_DONE,
    PAGE_TAKEN = const PAGE_TAKEN,
    PAGE_FREED = const PAGE_FREED,
    IN_USE = const IN_USE,
    LOCK = const LOCK,
    TICKS = const TICKS,
    ANSWERS = const ANSWERS,
    FIRST_PIC = const FIRST_PIC,
    SECOND_PIC = const SECOND_PIC,
    TIMER_COMMAND = const TIMER_COMMAND,
    TIMER_CHANNEL_0 = const TIMER_CHANNEL_0,
    TICK_VECTOR = const TICK_VECTOR,
    TICK_PERIOD = const TICK_PERIOD,
);

unsafe extern "C" {
    static memferry_kvm_program: u8;
    static memferry_kvm_program_on_tick: u8;
    static memferry_kvm_program_end: u8;
}

/// The program's bytes. They can be copied to any address; the first one is where every vCPU begins.
pub(super) fn code() -> &'static [u8] {
    let begin = &raw const memferry_kvm_program;
    let length = (&raw const memferry_kvm_program_end).addr() - begin.addr();
    // SAFETY: the assembly above puts both labels into one section of read-only data, this one first, and nothing writes there.
    unsafe { slice::from_raw_parts(begin, length) }
}

/// Where in the program the handler of the timer's interrupt begins.
pub(super) fn on_tick() -> u64 {
    let begin = (&raw const memferry_kvm_program).addr();
    ((&raw const memferry_kvm_program_on_tick).addr() - begin) as u64
}
