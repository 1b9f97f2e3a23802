//! Every interleaving of those who may meet on one page, by loom: two fault handlers of different
//! vCPUs, the bulk copy of tags, and swap-out.
//!
//! The page's frames come with a former owner's tag in every granule. Whatever the order, nobody
//! may see that tag, valid tags stay, and what was written last is there in the end.

use loom::sync::Arc;
use loom::thread;
use mte::Tag;

use super::{HostPage, SwapOut, TagStorage};
use crate::model::frame::Frame;

const STALE: Tag = Tag::from_low_bits(0xa);
const GUESTS: Tag = Tag::from_low_bits(3);
const COPIED: Tag = Tag::from_low_bits(5);

/// How often the scheduler may take the processor away from a thread that could go on. Bugs of
/// interleaving show with two or three (loom's own advice); with no bound, four threads take days.
const PREEMPTIONS: usize = 3;

fn in_every_order(threads: impl Fn() + Send + Sync + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(
        std::env::var("LOOM_MAX_PREEMPTIONS").map_or(PREEMPTIONS, |bound| {
            bound.parse().expect("LOOM_MAX_PREEMPTIONS is a number")
        }),
    );
    model.check(threads);
}

/// A page that somebody populated without using its tags, as a VMM does that loads a kernel.
fn populated_page() -> Arc<HostPage> {
    let page = HostPage::default();
    page.find_or_fill(|| Some(Frame::stale(STALE)), |_| ())
        .unwrap();
    Arc::new(page)
}

fn fault_in(page: &HostPage) -> Arc<Frame> {
    let frame = page
        .find_or_fill(|| Some(Frame::stale(STALE)), |_| ())
        .unwrap();
    frame.validate_tags();
    frame
}

/// A fault handler, and the STG for which the page was wanted.
fn store_tag(page: &HostPage, granule: usize) {
    fault_in(page).set_tag(granule, GUESTS);
}

/// A fault handler, and the LDG for which the page was wanted.
fn load_tag(page: &HostPage, granule: usize) -> Tag {
    fault_in(page).tag(granule)
}

/// The bulk copy into the guest.
fn copy_in(page: &HostPage) {
    let frame = page
        .find_or_fill(|| Some(Frame::stale(STALE)), |_| ())
        .unwrap();
    frame.overwrite_tags(|| frame.fill_tags(COPIED));
}

/// The bulk copy out of the guest: an untagged page has tags of 0.
fn copy_out(page: &HostPage, granule: usize) -> Tag {
    let frame = page.find(|| Some(Frame::stale(STALE))).unwrap().unwrap();
    frame
        .valid_tags()
        .map_or(Tag::ZERO, |tags| tags.get(granule as u8))
}

fn swap_out(page: &HostPage) -> SwapOut {
    page.swap_out(&TagStorage::new(1))
}

#[test]
fn two_fault_handlers_and_a_swap_out_lose_no_tag() {
    in_every_order(|| {
        let page = populated_page();
        let (first, second) = (Arc::clone(&page), Arc::clone(&page));
        let first = thread::spawn(move || store_tag(&first, 0));
        let second = thread::spawn(move || store_tag(&second, 1));
        swap_out(&page);
        first.join().unwrap();
        second.join().unwrap();

        assert_eq!(load_tag(&page, 0), GUESTS);
        assert_eq!(load_tag(&page, 1), GUESTS);
    });
}

#[test]
fn a_fault_handler_never_sees_stale_tags() {
    in_every_order(|| {
        let page = populated_page();
        let (first, second) = (Arc::clone(&page), Arc::clone(&page));
        let first = thread::spawn(move || store_tag(&first, 0));
        let second = thread::spawn(move || load_tag(&second, 0));
        let copied = copy_out(&page, 1);
        first.join().unwrap();

        assert_eq!(copied, Tag::ZERO);
        assert!([Tag::ZERO, GUESTS].contains(&second.join().unwrap()));
    });
}

#[test]
fn tags_copied_in_outlive_fault_handlers() {
    in_every_order(|| {
        let page = populated_page();
        let (first, second) = (Arc::clone(&page), Arc::clone(&page));
        let first = thread::spawn(move || store_tag(&first, 0));
        let second = thread::spawn(move || load_tag(&second, 1));
        copy_in(&page);
        first.join().unwrap();

        assert!([Tag::ZERO, COPIED].contains(&second.join().unwrap()));
        assert!([GUESTS, COPIED].contains(&load_tag(&page, 0)));
        assert_eq!(load_tag(&page, 1), COPIED);
    });
}

#[test]
fn two_fault_handlers_a_copy_and_a_swap_out_lose_no_tag() {
    in_every_order(|| {
        let page = populated_page();
        let (first, second, third) = (Arc::clone(&page), Arc::clone(&page), Arc::clone(&page));
        let first = thread::spawn(move || store_tag(&first, 0));
        let second = thread::spawn(move || load_tag(&second, 1));
        let third = thread::spawn(move || swap_out(&third));
        copy_in(&page);
        first.join().unwrap();
        third.join().unwrap();

        assert!([Tag::ZERO, COPIED].contains(&second.join().unwrap()));
        assert!([GUESTS, COPIED].contains(&load_tag(&page, 0)));
        assert_eq!(load_tag(&page, 1), COPIED);
    });
}
