package virtiopci

import (
	"encoding/binary"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
)

// readCommon writes out the common configuration structure, section 4.1.4.3. It
// is small enough to make the whole of it for every access. Called with t.mu
// held.
func (t *Transport) readCommon(b *[commonSize]byte) {
	le := binary.LittleEndian
	le.PutUint32(b[offDeviceFeatureSelect:], t.deviceFeatureSelect)
	le.PutUint32(b[offDeviceFeature:], half(t.features, t.deviceFeatureSelect))
	le.PutUint32(b[offDriverFeatureSelect:], t.driverFeatureSelect)
	le.PutUint32(b[offDriverFeature:], half(t.driverFeatures, t.driverFeatureSelect))
	le.PutUint16(b[offConfigVector:], uint16(t.configVector.Load()))
	le.PutUint16(b[offNumQueues:], uint16(len(t.queues)))
	b[offStatus] = t.status
	if t.needsReset.Load() {
		b[offStatus] |= statusNeedsReset
	}
	b[offConfigGeneration] = byte(t.configGeneration.Load())
	le.PutUint16(b[offQueueSelect:], t.queueSelect)
	q := t.selected()
	if q == nil {
		return // a queue size of zero says that there is no such queue
	}
	le.PutUint16(b[offQueueSize:], q.size)
	le.PutUint16(b[offQueueVector:], uint16(q.vector.Load()))
	if q.enabled {
		le.PutUint16(b[offQueueEnable:], 1)
	}
	le.PutUint16(b[offQueueNotifyOff:], q.index)
	le.PutUint64(b[offQueueDesc:], q.desc)
	le.PutUint64(b[offQueueDriver:], q.driver)
	le.PutUint64(b[offQueueDevice:], q.device)
}

// half is the 32 feature bits that a select register chooses.
func half(features uint64, selected uint32) uint32 {
	if selected > 1 {
		return 0
	}
	return uint32(features >> (32 * selected))
}

func (t *Transport) selected() *queue {
	if int(t.queueSelect) >= len(t.queues) {
		return nil
	}
	return t.queues[t.queueSelect]
}

// writeCommon is a write to the common configuration structure. A field is
// written as a whole, a 64-bit one also in halves (section 4.1.3.1); any other
// write is ignored, and so is one at a time the status does not allow. Called
// with t.mu held.
func (t *Transport) writeCommon(offset uint64, p []byte) {
	var v uint64
	switch len(p) {
	case 1:
		v = uint64(p[0])
	case 2:
		v = uint64(binary.LittleEndian.Uint16(p))
	case 4:
		v = uint64(binary.LittleEndian.Uint32(p))
	case 8:
		v = binary.LittleEndian.Uint64(p)
	}
	switch field := (field{int(offset), len(p)}); field {
	case field32(offDeviceFeatureSelect):
		t.deviceFeatureSelect = uint32(v)
	case field32(offDriverFeatureSelect):
		t.driverFeatureSelect = uint32(v)
	case field32(offDriverFeature):
		t.writeDriverFeature(uint32(v))
	case field16(offConfigVector):
		t.configVector.Store(t.vector(uint16(v)))
	case field8(offStatus):
		t.writeStatus(uint8(v))
	case field16(offQueueSelect):
		t.queueSelect = uint16(v)
	case field16(offQueueVector):
		if q := t.selected(); q != nil {
			q.vector.Store(t.vector(uint16(v)))
		}
	default:
		if q := t.selected(); q != nil && t.configurable(q) {
			q.write(field, v)
		}
	}
}

// field is a range of the structure.
type field struct{ offset, size int }

func field8(offset int) field  { return field{offset, 1} }
func field16(offset int) field { return field{offset, 2} }
func field32(offset int) field { return field{offset, 4} }

// vector is what a vector register reads back: section 4.1.5.1.2.1 lets the
// device say noVector when it cannot map the event.
func (t *Transport) vector(v uint16) uint32 {
	if int(v) >= t.msix.Vectors() {
		return noVector
	}
	return uint32(v)
}

// writeDriverFeature accepts feature bits in the only phase there is for it:
// section 3.1.1, step 4.
func (t *Transport) writeDriverFeature(v uint32) {
	if t.status&statusDriver == 0 || t.status&(statusFeaturesOK|statusFailed) != 0 || t.driverFeatureSelect > 1 {
		return
	}
	shift := 32 * t.driverFeatureSelect
	t.driverFeatures = t.driverFeatures&^(0xffffffff<<shift) | uint64(v)<<shift
}

// configurable says whether the driver may set up the queue: between
// FEATURES_OK and DRIVER_OK (section 3.1.1, step 7), before it is enabled.
func (t *Transport) configurable(q *queue) bool {
	return t.status&statusFeaturesOK != 0 && t.status&(statusDriverOK|statusFailed) == 0 && !q.enabled
}

// write sets one of a queue's own registers.
func (q *queue) write(f field, v uint64) {
	if f == field16(offQueueSize) {
		if size := uint16(v); size != 0 && size <= q.max && size&(size-1) == 0 {
			q.size = size
		}
		return
	}
	if f == field16(offQueueEnable) {
		q.enabled = v == 1 // nothing but a reset disables it
		return
	}
	for i, register := range []*uint64{&q.desc, &q.driver, &q.device} {
		offset := offQueueDesc + 8*i
		switch f {
		case field{offset, 8}:
			*register = v
		case field32(offset):
			*register = *register&^0xffffffff | v
		case field32(offset + 4):
			*register = *register&0xffffffff | v<<32
		}
	}
}

// writeStatus is the state machine of section 2.1 and 3.1.1. Zero resets;
// otherwise one bit may be added, in order: ACKNOWLEDGE, DRIVER, FEATURES_OK,
// DRIVER_OK, and FAILED at any time. Anything else is ignored, so that no order
// of writes gets a device into a state that the sequence does not have.
func (t *Transport) writeStatus(v uint8) {
	if v == 0 {
		t.reset()
		return
	}
	v &^= statusNeedsReset // the driver writes back what it read
	added := v &^ t.status
	if t.status&^v != 0 || added == 0 {
		return
	}
	const initialized = statusAcknowledge | statusDriver
	switch {
	case added == statusFailed,
		t.status == 0 && added == statusAcknowledge,
		t.status == statusAcknowledge && added == statusDriver:
		t.status = v
	case t.status == initialized && added == statusFeaturesOK:
		// The driver reads the bit back to see whether we agree.
		if t.driverFeatures&^t.features == 0 && t.driverFeatures&virtio.FeatureVersion1 != 0 {
			t.status = v
		}
	case t.status == initialized|statusFeaturesOK && added == statusDriverOK:
		t.status = v
		t.activate()
	}
}
