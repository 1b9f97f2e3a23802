//! The list of checks, and how one of them ends.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::checks::{
    asking, copy, copy_on_write, devices, dirty_log, races, refusal, registers, remapping, sharing,
    stale, swap, visibility, width,
};
use crate::{GuestFault, Testbed};

/// A row of «The seeds, point by point» (DESIGN.md) that speaks of the hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Row {
    /// The feature is found by asking a capability.
    Asking,
    /// ID registers and MTE registers are visible to the guest only with MTE on.
    Visibility,
    /// The four registers belong to the vCPU.
    Registers,
    /// Stale tags are cleared.
    StaleTags,
    /// Valid tags are kept.
    ValidTags,
    /// The VMM may change the backing at any time.
    Remapping,
    /// Wrong memory gets an error, at set-up and at the fault.
    WrongMemory,
    /// Tags copied in bulk.
    TagCopy,
    /// Devices neither check nor carry tags.
    Devices,
    /// Pages shared between mappings.
    SharedPages,
    /// No big lock: many CPUs fault pages in at once.
    ManyCpus,
    /// AArch32.
    Aarch32,
    /// Tags outlive swap.
    Swap,
    /// Which pages to send, by the dirty log.
    DirtyLog,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Asking => "asking",
            Self::Visibility => "visibility",
            Self::Registers => "registers",
            Self::StaleTags => "stale-tags",
            Self::ValidTags => "valid-tags",
            Self::Remapping => "remapping",
            Self::WrongMemory => "wrong-memory",
            Self::TagCopy => "tag-copy",
            Self::Devices => "devices",
            Self::SharedPages => "shared-pages",
            Self::ManyCpus => "many-cpus",
            Self::Aarch32 => "aarch32",
            Self::Swap => "swap",
            Self::DirtyLog => "dirty-log",
        })
    }
}

/// Why a check went no further.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// This host cannot do what the check is about.
    Skip(String),
    /// The host does wrong.
    Fail(String),
}

/// How a check ends.
pub type Verdict = Result<(), Stop>;

/// Skips a check unless `wanted`.
///
/// # Errors
/// [`Stop::Skip`].
pub fn require(wanted: bool, otherwise: &str) -> Verdict {
    wanted
        .then_some(())
        .ok_or_else(|| Stop::Skip(otherwise.to_owned()))
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Skip(reason) | Self::Fail(reason) => f.write_str(reason),
        }
    }
}

impl From<engine::Error> for Stop {
    fn from(error: engine::Error) -> Self {
        Self::Fail(error.to_string())
    }
}

impl From<engine::TagCopyError> for Stop {
    fn from(error: engine::TagCopyError) -> Self {
        Self::Fail(error.to_string())
    }
}

impl From<GuestFault> for Stop {
    fn from(fault: GuestFault) -> Self {
        Self::Fail(format!("the guest: {fault}"))
    }
}

impl From<std::io::Error> for Stop {
    fn from(error: std::io::Error) -> Self {
        Self::Fail(error.to_string())
    }
}

/// One check.
pub struct Check<T> {
    /// What it shows, as a sentence.
    pub name: &'static str,
    /// The row it belongs to.
    pub row: Row,
    run: fn(&T) -> Verdict,
}

impl<T> Check<T> {
    /// Runs it. A panic is a failure.
    ///
    /// # Errors
    /// See [`Stop`].
    pub fn run(&self, testbed: &T) -> Verdict {
        catch_unwind(AssertUnwindSafe(|| (self.run)(testbed)))
            .unwrap_or_else(|panic| Err(Stop::Fail(message(&*panic))))
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("panicked")
        .to_owned()
}

/// All checks, row by row.
pub fn checks<T: Testbed>() -> Vec<Check<T>> {
    macro_rules! rows {
        ($($row:ident: $module:ident { $($name:ident),* $(,)? })*) => {
            vec![$($(Check {
                name: stringify!($name),
                row: Row::$row,
                run: $module::$name::<T>,
            }),*),*]
        };
    }
    rows! {
        Asking: asking { a_host_with_mte_says_so }
        Visibility: visibility {
            with_mte_the_guest_sees_the_level_that_the_host_announced,
            without_mte_the_guest_sees_none,
            with_mte_the_four_registers_are_listed_and_the_guest_has_them,
            without_mte_the_four_registers_do_not_exist,
            without_mte_the_four_registers_are_undefined_to_the_guest,
            without_mte_tags_are_neither_stored_nor_copied,
            the_level_cannot_be_changed,
        }
        Registers: registers {
            each_register_is_saved_and_restored,
            two_vcpus_on_one_thread_keep_their_registers_apart,
            two_vcpus_at_once_keep_their_registers_apart,
        }
        StaleTags: stale {
            memory_that_the_guest_touches_first_shows_no_stale_tags,
            memory_that_the_vmm_wrote_first_shows_no_stale_tags,
            shared_memory_shows_no_stale_tags,
            the_tag_copy_shows_no_stale_tags,
            a_tag_store_as_first_touch_leaves_no_stale_tags_around_it,
        }
        ValidTags: remapping {
            tags_outlive_a_memslot_that_goes_and_comes_back_elsewhere,
            tags_outlive_the_move_of_a_memslot,
            tags_outlive_the_beginning_and_the_end_of_logging,
        }
        ValidTags: copy_on_write {
            a_copy_on_write_keeps_the_tags,
            a_tag_store_in_a_clone_changes_that_clone_alone,
            the_tag_copy_into_a_clone_changes_that_clone_alone,
        }
        Remapping: remapping {
            tags_outlive_a_new_mapping_of_the_same_private_memory,
            tags_outlive_a_new_mapping_of_the_same_shared_memory,
            other_memory_at_the_same_address_has_its_own_tags,
        }
        WrongMemory: refusal {
            a_disks_file_is_refused_at_the_memslot,
            a_disks_file_is_welcome_without_mte,
            a_memslot_of_which_a_part_cannot_hold_tags_is_refused,
            a_disks_file_that_came_later_is_found_at_the_fault,
            memory_that_is_gone_is_found_at_the_fault,
            a_vmm_that_mends_the_mapping_can_go_on,
            tags_work_in_a_private_disks_file_where_the_host_gives_it,
            huge_pages_are_taken_where_the_host_announces_them,
        }
        TagCopy: copy {
            what_was_copied_in_is_what_the_guest_loads,
            what_the_guest_stored_is_what_is_copied_out,
            tags_copied_in_before_the_first_touch_are_kept,
            untouched_memory_has_tags_of_zero,
            only_the_low_four_bits_count,
            parts_of_pages_are_refused,
            more_than_two_gib_are_refused,
            nothing_to_copy_is_no_error,
            memory_that_is_not_the_guests_is_an_error,
            the_count_is_short_where_the_guests_memory_ends,
            a_read_only_memslot_gives_tags_and_takes_none,
            a_buffer_that_faults_in_the_first_page_is_an_error,
            a_buffer_that_faults_later_makes_the_count_short,
            a_page_whose_buffer_faulted_has_no_stale_tags,
        }
        Devices: devices {
            a_device_writes_tagged_memory_unchecked_and_leaves_the_tags,
            a_device_reads_tagged_memory_unchecked,
        }
        SharedPages: sharing {
            shared_memory_is_taken_where_the_host_announces_it,
            shared_memory_that_came_later_is_found_at_the_fault,
            two_guests_see_each_others_tags_in_shared_memory,
            a_guests_tags_are_seen_by_a_process_and_the_other_way_round,
        }
        ManyCpus: races {
            two_vcpus_touch_the_same_pages_first_while_tags_are_copied_out,
            two_vcpus_touch_pages_first_while_tags_are_copied_in,
            two_guests_touch_the_same_shared_pages_first,
        }
        Aarch32: width {
            a_32_bit_el1_is_refused_with_mte,
            the_host_itself_refuses_a_32_bit_el1_with_mte,
            a_32_bit_el1_is_welcome_without_mte,
            a_32_bit_program_stores_data_and_leaves_tags_and_registers,
        }
        Swap: swap {
            tags_of_private_memory_outlive_swap,
            tags_of_shared_memory_outlive_swap,
            untagged_memory_that_was_swapped_shows_no_stale_tags,
            tags_are_copied_out_of_swapped_memory,
            tags_are_copied_into_swapped_memory,
            memory_is_swapped_while_two_vcpus_tag_it,
        }
        DirtyLog: dirty_log {
            a_store_of_data_is_logged,
            a_store_of_a_tag_alone_is_logged,
            a_load_of_a_tag_is_not_logged,
            a_page_is_logged_again_after_the_log_was_taken,
            tags_cannot_be_copied_in_while_writes_are_logged,
            tags_can_be_copied_out_while_writes_are_logged,
            tags_can_be_copied_in_when_logging_has_ended,
        }
    }
}
