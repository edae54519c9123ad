package agenttest

import (
	"context"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// NoteTime notes nothing: there is no clock.
func (a *Agent) NoteTime(_ context.Context, r *emptypb.Empty) (*emptypb.Empty, error) {
	if reply, err := enter[emptypb.Empty](a, "NoteTime", r); reply != nil || err != nil {
		return reply, err
	}
	return &emptypb.Empty{}, nil
}

// CorrectTime corrects nothing.
func (a *Agent) CorrectTime(_ context.Context, r *agentproto.CorrectTimeRequest) (*emptypb.Empty, error) {
	if reply, err := enter[emptypb.Empty](a, "CorrectTime", r); reply != nil || err != nil {
		return reply, err
	}
	return &emptypb.Empty{}, nil
}
