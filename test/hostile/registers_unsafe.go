package main

import "unsafe"

// Registers are accessed as a whole: what Go makes of copies of bytes is its own affair, and KVM knows not every instruction that
// it may take for that.

func (d *device) set8(offset uint32, v uint8)   { *(*uint8)(d.at(offset)) = v }
func (d *device) set16(offset uint32, v uint16) { *(*uint16)(d.at(offset)) = v }
func (d *device) set32(offset uint32, v uint32) { *(*uint32)(d.at(offset)) = v }
func (d *device) get32(offset uint32) uint32    { return *(*uint32)(d.at(offset)) }

// at is where a register is. It is not inlined, so that no two accesses become one.
//
//go:noinline
func (d *device) at(offset uint32) unsafe.Pointer { return unsafe.Pointer(&d.bar[offset]) }

// virtual is where b is in this program's memory.
func virtual(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }
