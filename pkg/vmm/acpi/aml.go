package acpi

import "encoding/binary"

// The few productions of the ACPI Machine Language that our DSDT needs: ACPI
// 6.5, section 20.2. Each function returns the encoding of one term.

// name is a NameSeg (4 characters, padded with '_'), absolute when it starts
// with '\'.
func name(s string) []byte {
	var b []byte
	if s[0] == '\\' {
		b, s = append(b, '\\'), s[1:]
	}
	seg := []byte("____")
	copy(seg, s)
	return append(b, seg...)
}

// integer is a ConstObj or the shortest ConstPrefix form of v.
func integer(v uint64) []byte {
	switch {
	case v <= 1:
		return []byte{byte(v)} // ZeroOp, OneOp
	case v <= 0xff:
		return []byte{0x0a, byte(v)}
	case v <= 0xffff:
		return binary.LittleEndian.AppendUint16([]byte{0x0b}, uint16(v))
	case v <= 0xffffffff:
		return binary.LittleEndian.AppendUint32([]byte{0x0c}, uint32(v))
	}
	return binary.LittleEndian.AppendUint64([]byte{0x0e}, v)
}

// eisaID is the compressed form of an id such as "PNP0A08": three letters of
// five bits and four hexadecimal digits, big-endian (section 19.3.4).
func eisaID(s string) []byte {
	v := uint32(s[0]-'@')<<26 | uint32(s[1]-'@')<<21 | uint32(s[2]-'@')<<16
	for i, c := range []byte(s[3:7]) {
		d := uint32(c - '0')
		if c >= 'A' {
			d = uint32(c-'A') + 10
		}
		v |= d << (12 - 4*i)
	}
	return binary.BigEndian.AppendUint32([]byte{0x0c}, v)
}

// withLength puts a PkgLength, which counts itself, before body.
func withLength(body []byte) []byte {
	n := len(body)
	switch {
	case n+1 < 1<<6:
		return append([]byte{byte(n + 1)}, body...)
	case n+2 < 1<<12:
		n += 2
		return append([]byte{1<<6 | byte(n&0xf), byte(n >> 4)}, body...)
	}
	n += 3
	return append([]byte{2<<6 | byte(n&0xf), byte(n >> 4), byte(n >> 12)}, body...)
}

func join(parts ...[]byte) []byte {
	var b []byte
	for _, p := range parts {
		b = append(b, p...)
	}
	return b
}

// nameOp is Name(n, value).
func nameOp(n string, value []byte) []byte { return join([]byte{0x08}, name(n), value) }

// pkg is Package() {elements}.
func pkg(elements ...[]byte) []byte {
	return append([]byte{0x12}, withLength(join([]byte{byte(len(elements))}, join(elements...)))...)
}

// scope is Scope(n) {terms}.
func scope(n string, terms ...[]byte) []byte {
	return append([]byte{0x10}, withLength(join(name(n), join(terms...)))...)
}

// device is Device(n) {terms}.
func device(n string, terms ...[]byte) []byte {
	return append([]byte{0x5b, 0x82}, withLength(join(name(n), join(terms...)))...)
}

// resourceTemplate is a Buffer of resource descriptors and their end tag
// (section 6.4); a checksum of zero counts as correct.
func resourceTemplate(descriptors ...[]byte) []byte {
	b := join(join(descriptors...), []byte{0x79, 0})
	return append([]byte{0x11}, withLength(join(integer(uint64(len(b))), b))...)
}

// Address space descriptors say that their ends are fixed (bits 2 and 3 of the
// general flags) and that the bridge passes the range on (bit 0 clear).
const rangeFixed = 1<<2 | 1<<3

// wordBusNumber is a Word Address Space Descriptor for bus numbers, 6.4.3.5.3.
func wordBusNumber(first, last uint16) []byte {
	b := []byte{0x88, 13, 0, 2, rangeFixed, 0}
	for _, v := range []uint16{0, first, last, 0, last - first + 1} {
		b = binary.LittleEndian.AppendUint16(b, v)
	}
	return b
}

// dwordMemory is a DWord Address Space Descriptor for memory, 6.4.3.5.2:
// uncached and writable.
func dwordMemory(start, size uint32) []byte {
	b := []byte{0x87, 23, 0, 0, rangeFixed, 1}
	for _, v := range []uint32{0, start, start + size - 1, 0, size} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return b
}

// memory32Fixed is a 32-Bit Fixed Memory Range Descriptor, 6.4.3.4: writable.
func memory32Fixed(start, size uint32) []byte {
	b := binary.LittleEndian.AppendUint32([]byte{0x86, 9, 0, 1}, start)
	return binary.LittleEndian.AppendUint32(b, size)
}
