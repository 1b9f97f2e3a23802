//! The architecture of Arm's Memory Tagging Extension.
#![no_std]
