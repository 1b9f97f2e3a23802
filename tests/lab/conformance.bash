# What the conformance tests of all kernels have alike.
. "$(dirname "${BASH_SOURCE[0]}")/guests.bash"

# conformance_passes: all checks pass on this host's KVM.
conformance_passes() {
    add_swap
    conformance | tee checks || fail 'not all checks passed'
    # These the lab's host has; what else is missing is the kernel's to have or not.
    if grep -E 'no swap|none of the freed pages|only root|no file on a disk|no huge pages|no AArch32' checks; then
        fail 'checks were skipped for want of something that this host has'
    fi
}
