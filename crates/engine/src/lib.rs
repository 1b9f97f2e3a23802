//! What a hypervisor offers a virtual machine monitor.
