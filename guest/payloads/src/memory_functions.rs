//! The five functions that compiled Rust code calls to copy, fill and compare memory, which an operating system's C
//! library would supply. Written in assembly, because a loop in Rust may be compiled into a call to the very function
//! it implements. A byte at a time: payloads move little memory.

core::arch::global_asm!(
    r#"
    .macro function name
    .section .text.\name, "ax"
    .global \name
    .type \name, %function
    \name:
    .endm

    function memcpy
        mov x3, x0
    1:  cbz x2, 2f
        ldrb w4, [x1], #1
        strb w4, [x3], #1
        sub x2, x2, #1
        b 1b
    2:  ret

    function memmove
        sub x3, x0, x1          // forwards, unless the destination begins inside the source
        cmp x3, x2
        b.hs memcpy
    1:  cbz x2, 2f
        sub x2, x2, #1
        ldrb w4, [x1, x2]
        strb w4, [x0, x2]
        b 1b
    2:  ret

    function memset
        mov x3, x0
    1:  cbz x2, 2f
        strb w1, [x3], #1
        sub x2, x2, #1
        b 1b
    2:  ret

    function memcmp
        mov x3, x0
        mov w0, #0
    1:  cbz x2, 2f
        ldrb w4, [x3], #1
        ldrb w5, [x1], #1
        sub x2, x2, #1
        subs w0, w4, w5
        b.eq 1b
    2:  ret

    function bcmp
        b memcmp
    "#
);
