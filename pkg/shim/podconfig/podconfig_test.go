package podconfig

import (
	"encoding/json"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// What the interface has, all of it, can be read, and is written as its own
// package writes it.
func TestSameAsCRI(t *testing.T) {
	theirs := &cri.PodSandboxConfig{}
	fill(theirs.ProtoReflect())
	theirs.Windows = nil
	if name := theirs.ProtoReflect().Descriptor().FullName(); name != TypeName {
		t.Errorf("the type is %s", name)
	}
	wire, err := proto.Marshal(theirs)
	if err != nil {
		t.Fatal(err)
	}
	ours := &PodSandboxConfig{}
	if err := proto.Unmarshal(wire, ours); err != nil {
		t.Fatal(err)
	}
	checkKnown(t, ours.ProtoReflect())
	want, err1 := json.Marshal(theirs)
	got, err2 := json.Marshal(ours)
	if err1 != nil || err2 != nil || string(got) != string(want) {
		t.Errorf("%s, %v\nnot\n%s, %v", got, err2, want, err1)
	}
}

// fill sets every field, and every enumeration to its last value.
func fill(m protoreflect.Message) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		switch {
		case f.IsMap():
			m.Mutable(f).Map().Set(protoreflect.ValueOfString(string(f.Name())).MapKey(), protoreflect.ValueOfString("x"))
		case f.IsList() && f.Message() != nil:
			fill(m.Mutable(f).List().AppendMutable().Message())
		case f.IsList():
			m.Mutable(f).List().Append(scalar(f))
		case f.Message() != nil:
			fill(m.Mutable(f).Message())
		default:
			m.Set(f, scalar(f))
		}
	}
}

// scalar is a value that no other field of a message has, where that is possible.
func scalar(f protoreflect.FieldDescriptor) protoreflect.Value {
	switch n := int32(f.Number()); f.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(string(f.Name()))
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(true)
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(-n)
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(-int64(n))
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(uint32(n))
	case protoreflect.Uint64Kind:
		return protoreflect.ValueOfUint64(uint64(n))
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(protoreflect.EnumNumber(f.Enum().Values().Len() - 1))
	default:
		panic("a field of the kind " + f.Kind().String())
	}
}

// checkKnown fails where a message has a field that was not read.
func checkKnown(t *testing.T, m protoreflect.Message) {
	if u := m.GetUnknown(); len(u) > 0 {
		t.Errorf("%s: unknown fields %x", m.Descriptor().Name(), u)
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsMap() || f.Message() == nil:
		case f.IsList():
			for i := range v.List().Len() {
				checkKnown(t, v.List().Get(i).Message())
			}
		default:
			checkKnown(t, v.Message())
		}
		return true
	})
}
