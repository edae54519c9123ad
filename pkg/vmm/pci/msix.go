package pci

import (
	"encoding/binary"
	"sync"
)

// MSI-X, PCI Local Bus Specification 3.0, section 6.8.2.
const (
	maxVectors = 2048
	entrySize  = 16

	controlEnable = 1 << 15
	controlMask   = 1 << 14

	entryMasked = 1 // of an entry's control word
)

// pendingSize is the size of the pending bit array in bytes: whole quadwords.
func pendingSize(vectors int) uint64 { return uint64(vectors+63) / 64 * 8 }

// MSIX is a function's message-signalled interrupts. Its exported methods may
// be called from any goroutine.
type MSIX struct {
	bar            int
	table, pending uint64 // offsets in the BAR
	send           func(addr uint64, data uint32)

	mu      sync.RWMutex // held for reading while a message is sent: a mask takes effect before its write returns
	control uint16
	entries []entry
	bits    []uint64 // pending
}

type entry struct {
	addr    uint64
	data    uint32
	control uint32
}

func newMSIX(vectors, bar int, table, pending uint32, send func(uint64, uint32)) *MSIX {
	m := &MSIX{
		bar: bar, table: uint64(table), pending: uint64(pending), send: send,
		entries: make([]entry, vectors),
		bits:    make([]uint64, pendingSize(vectors)/8),
	}
	for i := range m.entries {
		m.entries[i].control = entryMasked
	}
	return m
}

// Vectors is the size of the table.
func (m *MSIX) Vectors() int { return len(m.entries) }

// Enabled says whether the guest uses MSI-X.
func (m *MSIX) Enabled() bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.control&controlEnable != 0
}

// Trigger sends the vector's message, or remembers to when it is masked. While
// the guest has MSI-X off, and for a vector that does not exist, it does
// nothing.
func (m *MSIX) Trigger(vector int) {
	if vector < 0 || vector >= len(m.entries) {
		return
	}
	if !m.trySend(vector) {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.bits[vector/64] |= 1 << (vector % 64)
		m.flush(vector) // the mask may be gone since
	}
}

// trySend says false when the vector is masked.
func (m *MSIX) trySend(vector int) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.control&controlEnable == 0 {
		return true
	}
	if m.masked(vector) {
		return false
	}
	e := &m.entries[vector]
	m.send(e.addr, e.data)
	return true
}

func (m *MSIX) masked(vector int) bool {
	return m.control&controlMask != 0 || m.entries[vector].control&entryMasked != 0
}

// flush sends the message if it is pending and may go. Called with m.mu held.
func (m *MSIX) flush(vector int) {
	word, bit := &m.bits[vector/64], uint64(1)<<(vector%64)
	if *word&bit == 0 || m.control&controlEnable == 0 || m.masked(vector) {
		return
	}
	*word &^= bit
	e := &m.entries[vector]
	m.send(e.addr, e.data)
}

// setControl is told the capability's message control word.
func (m *MSIX) setControl(control uint16) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.control = control
	if control&controlEnable == 0 {
		clear(m.bits) // nobody would be told any more
	}
	for i := range m.entries {
		m.flush(i)
	}
}

// Accesses to the table and the pending bits are of 4 or 8 bytes, aligned; the
// result of any other is undefined (section 6.8.2): ignored, reads as zero.
func validTableAccess(offset uint64, n int) bool {
	return (n == 4 || n == 8) && offset%uint64(n) == 0
}

// read fills p when the access is to the table or the pending bits, which must
// not share a page with anything else a driver may access (section 6.8.2).
func (m *MSIX) read(bar int, offset uint64, p []byte) bool {
	if bar != m.bar {
		return false
	}
	if in(offset, m.table, uint64(len(m.entries))*entrySize) {
		clear(p)
		if !validTableAccess(offset-m.table, len(p)) {
			return true
		}
		m.mu.RLock()
		defer m.mu.RUnlock()
		var b [entrySize]byte
		m.entries[(offset-m.table)/entrySize].encode(&b)
		copy(p, b[(offset-m.table)%entrySize:])
		return true
	}
	if in(offset, m.pending, uint64(len(m.bits))*8) {
		clear(p)
		if !validTableAccess(offset-m.pending, len(p)) {
			return true
		}
		m.mu.RLock()
		defer m.mu.RUnlock()
		b := binary.LittleEndian.AppendUint64(nil, m.bits[(offset-m.pending)/8])
		copy(p, b[(offset-m.pending)%8:])
		return true
	}
	return false
}

// write is read's counterpart; the pending bits are read-only.
func (m *MSIX) write(bar int, offset uint64, p []byte) bool {
	if bar != m.bar {
		return false
	}
	if in(offset, m.table, uint64(len(m.entries))*entrySize) {
		if validTableAccess(offset-m.table, len(p)) {
			m.mu.Lock()
			defer m.mu.Unlock()
			vector := int((offset - m.table) / entrySize)
			var b [entrySize]byte
			m.entries[vector].encode(&b)
			copy(b[(offset-m.table)%entrySize:], p)
			m.entries[vector].decode(&b)
			m.flush(vector)
		}
		return true
	}
	return in(offset, m.pending, uint64(len(m.bits))*8)
}

func in(offset, start, size uint64) bool { return offset >= start && offset-start < size }

func (e *entry) encode(b *[entrySize]byte) {
	binary.LittleEndian.PutUint64(b[:], e.addr)
	binary.LittleEndian.PutUint32(b[8:], e.data)
	binary.LittleEndian.PutUint32(b[12:], e.control)
}

func (e *entry) decode(b *[entrySize]byte) {
	e.addr = binary.LittleEndian.Uint64(b[:]) &^ 3 // the two lowest bits must be zero
	e.data = binary.LittleEndian.Uint32(b[8:])
	e.control = binary.LittleEndian.Uint32(b[12:]) & entryMasked
}
