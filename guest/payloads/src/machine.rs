//! What the device tree says of the machine.

use core::ops::Range;

use dtoolkit::fdt::{Fdt, FdtNode};
use dtoolkit::standard::NodeStandard;
use dtoolkit::{Node, Property};

use crate::processors::MAX_PROCESSORS;

/// The machine as its device tree describes it.
pub struct Machine {
    /// Address of the device tree, as passed in `x0`.
    pub device_tree: u64,
    /// Addresses of the first bank of RAM.
    pub memory: Range<u64>,
    /// The GICv3, if there is one.
    pub gic: Option<Gic>,
    bootargs: &'static str,
    processors: [u64; MAX_PROCESSORS],
    processor_count: usize,
}

/// Where the GICv3's registers are.
#[derive(Clone, Copy)]
pub struct Gic {
    /// Address of the distributor.
    pub distributor: u64,
    /// Addresses of all redistributors.
    pub redistributors: (u64, u64),
}

/// What is wrong with a device tree.
#[derive(Debug, thiserror::Error)]
pub enum DeviceTreeError {
    /// No memory node, or one without an address.
    #[error("there is no RAM in it: give the machine a /memory node with a reg property")]
    NoMemory,
    /// No node below `/cpus`.
    #[error("there is no CPU in it: give the machine a /cpus/cpu node with a reg property")]
    NoProcessor,
    /// More CPUs than payloads have stacks for.
    #[error("it has more than {MAX_PROCESSORS} CPUs, which is all that payloads have room for")]
    TooManyProcessors,
}

impl Machine {
    /// Reads what payloads need from `tree`, which lies at `device_tree`.
    ///
    /// # Errors
    /// The tree names no RAM, no CPU, or more CPUs than [`MAX_PROCESSORS`].
    pub fn describe(tree: Fdt<'static>, device_tree: u64) -> Result<Self, DeviceTreeError> {
        let memory = tree.find_node("/memory").and_then(|node| region(node, 0));
        let (processors, processor_count) = processors(tree)?;
        Ok(Self {
            device_tree,
            memory: memory.ok_or(DeviceTreeError::NoMemory)?,
            gic: find_compatible(tree.root(), "arm,gic-v3").and_then(gic),
            bootargs: text(tree, "/chosen", "bootargs").unwrap_or(""),
            processors,
            processor_count,
        })
    }

    /// The MPIDR_EL1 affinity of every vCPU, in the order of the device tree. The first is the one that boots.
    pub fn processors(&self) -> &[u64] {
        &self.processors[..self.processor_count]
    }

    /// The whole command line.
    pub fn bootargs(&self) -> &'static str {
        self.bootargs
    }

    /// The value of the first `name=value` word of the command line.
    pub fn argument(&self, name: &str) -> Option<&'static str> {
        self.bootargs
            .split_whitespace()
            .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }
}

/// The string property `name` of the node at `path`.
pub(crate) fn text(tree: Fdt<'static>, path: &str, name: &str) -> Option<&'static str> {
    let property = tree
        .find_node(path)?
        .properties()
        .find(|property| property.name() == name)?;
    property.value_as::<&'static str>().ok()
}

/// Entry number `index` of a node's `reg` property.
pub(crate) fn region(node: FdtNode<'static>, index: usize) -> Option<Range<u64>> {
    let reg = node.reg().ok()??.nth(index)?;
    let start: u64 = reg.address().ok()?;
    Some(start..start.checked_add(reg.size().ok()?)?)
}

/// The node below `node`, at any depth, that is compatible with `name`.
pub(crate) fn find_compatible(node: FdtNode<'static>, name: &str) -> Option<FdtNode<'static>> {
    if node.is_compatible(name) {
        return Some(node);
    }
    node.children()
        .find_map(|child| find_compatible(child, name))
}

fn gic(node: FdtNode<'static>) -> Option<Gic> {
    let redistributors = region(node, 1)?;
    Some(Gic {
        distributor: region(node, 0)?.start,
        redistributors: (redistributors.start, redistributors.end),
    })
}

fn processors(tree: Fdt<'static>) -> Result<([u64; MAX_PROCESSORS], usize), DeviceTreeError> {
    let mut affinities = [0; MAX_PROCESSORS];
    let mut count = 0;
    let cpus = tree
        .find_node("/cpus")
        .ok_or(DeviceTreeError::NoProcessor)?;
    for cpu in cpus
        .children()
        .filter(|node| node.name_without_address() == "cpu")
    {
        let affinity = cpu
            .reg()
            .ok()
            .flatten()
            .and_then(|mut reg| reg.next()?.address().ok());
        let slot = affinities
            .get_mut(count)
            .ok_or(DeviceTreeError::TooManyProcessors)?;
        *slot = affinity.ok_or(DeviceTreeError::NoProcessor)?;
        count += 1;
    }
    if count == 0 {
        return Err(DeviceTreeError::NoProcessor);
    }
    Ok((affinities, count))
}
