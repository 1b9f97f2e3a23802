//! `tagvisor`: runs Arm virtual machines whose memory tags survive.

fn main() {}
