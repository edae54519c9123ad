// Package kvm is the kernel's KVM API: one type for each kind of descriptor
// (System, VM, VCPU) with a method for each ioctl, named after it. It holds no
// policy: what to set and in which order is the caller's.
//
// The API is described in the kernel's Documentation/virt/kvm/api.rst; the
// names in comments that start with KVM_ are its names. The layouts and numbers
// are compared with <linux/kvm.h> by a test.
package kvm
