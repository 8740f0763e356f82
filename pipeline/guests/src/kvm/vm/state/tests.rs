//! The format of the state. None of these tests needs KVM.

use super::*;

fn board() -> Board {
    Board {
        chips: CHIPS.map(|chip_id| kvm_irqchip { chip_id, ..Default::default() }),
        timer: kvm_pit_state2::default(),
        clock: 300,
        registers: *b"12345678",
        line: b"v0".to_vec(),
        heartbeats: 5,
        troubles: 6,
        ticks: 7,
        passes: vec![8, 9],
        in_use: vec![u64::MAX],
    }
}

fn setup() -> Setup {
    let entry = kvm_cpuid_entry2 { function: 7, index: 1, eax: 2, ebx: 3, ecx: 4, edx: 5, ..Default::default() };
    Setup {
        memory: 4 << 20,
        vcpus: 2,
        region: 1 << 16,
        region_at: 2 << 20,
        bytes: 64,
        pages_per_second: 5_000.0,
        free: 0,
        unplugged: 4096,
        shared_bytes: 0,
        cpuid: vec![entry],
    }
}

/// Lengths and bytes of each section. If they change, the format has another version. The kernel's structs count with
/// their lengths.
#[test]
fn the_format_is_that_of_its_version() {
    assert_eq!(VERSION, 3);
    let entry = [7, 1, 0, 2, 3, 4, 5, 0, 0, 0].map(u32::to_le_bytes).concat();
    let numbers = b"\x80\x80\x80\x02\x02\x80\x80\x04\x80\x80\x80\x01@\0\0\0\0\0\x88\xb3@\0\x80 \0";
    assert_eq!(encoded(&setup()), [&numbers[..], &[1, 40], &entry].concat());

    let chip = |chip_id: u32| [&[0x88, 4][..], &chip_id.to_le_bytes(), &[0; 516]].concat();
    let rest = b"\xac\x0212345678\x02v0\x05\x06\x07\x02\x08\x09\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01";
    let chips = CHIPS.map(chip).concat();
    assert_eq!(encoded(&board()), [&chips[..], &[112], &[0; 112], rest].concat());
}

/// kvm-bindings pads or cuts a struct of another length; here it is refused.
#[test]
fn structs_of_other_lengths_and_long_lists_are_refused() {
    let refused = |bytes: Vec<u8>, most| {
        let section = section("board", VERSION, bytes);
        value_of::<Board>(&section, "board", VERSION, most).map(drop).unwrap_err().to_string()
    };
    let sound = encoded(&board());
    let (shorter, longer) = ([&[0x87, 4], &sound[3..]].concat(), [&[0x89, 4, 0], &sound[2..]].concat());
    for bytes in [shorter, longer] {
        assert!(refused(bytes, MOST_BYTES).ends_with("the value encodes to other bytes"));
    }
    let words = encoded(&Board { in_use: vec![0; 3000], line: vec![0; MOST_BYTES], ..board() });
    assert!(refused(words, MOST_BYTES).ends_with("at most 32768 can be"));
    // Its last list has 1 item, and counts 2^32.
    let counted = [&sound[..sound.len() - 11], &[0xff, 0xff, 0xff, 0xff, 0xf, 1]].concat();
    assert!(refused(counted, MOST_BYTES).ends_with("it ends within a value"));
    let trailing = [&sound[..], &[0]].concat();
    assert!(refused(trailing, MOST_BYTES).ends_with("1 bytes are left"));
    let older = value_of::<Board>(&section("board", 2, sound), "board", VERSION, MOST_BYTES).map(drop).unwrap_err();
    assert_eq!(older.to_string(), "the state \"board\" version 2 came, here belongs \"board\" version 3");
}
